"""`--init FILE --strength S`: what is refused before a model is loaded, the two ends, the report, and the replay."""

from pathlib import Path

import pytest
from PIL import Image

from suite.diffusion.start import Init
from suite.errors import ConfigError
from suite.host.discovery import MODALITIES, installed


@pytest.fixture
def picture(here: Path) -> Path:
    """4x4 pixels, all different."""
    Image.frombytes("RGB", (4, 4), bytes(range(0, 240, 5))).save(here / "input.png")
    return here / "input.png"


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.convert("RGB").tobytes()


def make(suite, model, *words, seed=3):
    out = Path("out.png")
    done = suite(
        "fake",
        "a cat",
        "--model",
        model,
        "--steps",
        10,
        "--schedule",
        "uniform",
        "--seed",
        seed,
        "-o",
        out,
        "--json",
        *words,
    )
    assert done.code == 0, done.out
    return pixels(out), done.json["reports"][0]


def test_strength_0_is_the_file_and_1_the_plain_run(suite, here, model, picture):
    plain, report = make(suite, model)
    assert report["start"] is None and (report["steps"], report["nfe"]) == (10, 10)
    nothing, report = make(suite, model, "--init", picture, "--strength", 0)
    assert nothing == pixels(picture) and (report["steps"], report["nfe"]) == (0, 0)
    everything, report = make(suite, model, "--init", picture, "--strength", 1)
    assert everything == plain and (report["steps"], report["nfe"]) == (10, 10)


def test_in_between_it_is_neither_and_runs_its_share(suite, here, model, picture):
    half, report = make(suite, model, "--init", picture, "--strength", 0.5)
    assert half not in (pixels(picture), make(suite, model)[0])
    assert (report["steps"], report["nfe"]) == (5, 5)
    start = report["start"]
    assert start["time"] == 0.5
    assert len(start.pop("sha256")) == 64
    assert start == {"init": "input.png", "strength": 0.5, "time": 0.5, "steps": 5, "of": 10}
    assert make(suite, model, "--init", picture, "--strength", 0.5)[0] == half
    assert make(suite, model, "--init", picture, "--strength", 0.5, seed=4)[0] != half
    assert make(suite, model, "--init", picture)[1]["start"]["steps"] == 6


def test_a_cache_that_nothing_was_left_for_is_no_error(suite, here, model, picture):
    words = ["--init", picture, "--cache", "fake-count"]
    assert make(suite, model, *words, "--strength", 0)[1]["plugins"][-1]["did"] == 0
    assert make(suite, model, *words, "--strength", 0.3)[1]["plugins"][-1]["did"] > 0


def test_the_same_again(suite, here, model, picture):
    make(suite, model, "--init", picture, "--strength", 0.4)
    done = suite("replay", "out.png", "--model", model, "--init", picture)
    assert done.code == 0 and "bit-identical" in done.out
    assert "began with the file 'input.png'; add --init FILE" in suite("replay", "out.png", "--model", model).err
    Image.new("RGB", (4, 4), "red").save(here / "other.png")
    assert "its content differs" in suite("replay", "out.png", "--model", model, "--init", "other.png").err
    make(suite, model)
    assert "did not begin with a file" in suite("replay", "out.png", "--model", model, "--init", picture).err


BAD = {
    "no such file": (["--init", "absent.png"], ["--init absent.png cannot be read: No such file"]),
    "another kind": (["--init", "note.txt"], ["cannot begin with .txt; expected .png"]),
    "no ending": (["--init", "note"], ["cannot begin with a file without ending"]),
    "not a picture": (["--init", "torn.png"], ["--init: torn.png is not a readable picture"]),
    "a folder": (["--init", "folder.png"], ["--init", "folder.png"]),
    "strength above 1": (["--init", "input.png", "--strength", "1.1"], ["--strength 1.1: expected a number from 0"]),
    "strength below 0": (["--init", "input.png", "--strength", "-0.1"], ["--strength -0.1"]),
    "strength that is no number": (["--init", "input.png", "--strength", "nan"], ["--strength nan"]),
    "strength alone": (["--strength", "0.5"], ["--strength 0.5 is for --init FILE"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_the_model_is_loaded(case, suite, here, model, picture):
    words, expected = BAD[case]
    (here / "note.txt").write_text("words")
    (here / "note").write_text("words")
    (here / "torn.png").write_bytes(picture.read_bytes()[:30])
    (here / "folder.png").mkdir()
    (model / "model.safetensors").unlink()  # whoever loads it fails in other words
    before = sorted(here.rglob("*"))
    done = suite("fake", "a cat", "--model", model, *words)
    assert done.code == 2 and all(text in done.err for text in expected), done.err
    assert sorted(here.rglob("*")) == before


JUNK = [(m, s) for m in ("image", "video", "audio", "text") for s in installed(MODALITIES)[m].load().reads]


@pytest.mark.parametrize(("modality", "suffix"), JUNK)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe junk \x80"], ids=["empty", "junk"])
def test_no_modality_trips_over_what_it_cannot_read(here, modality, suffix, content):
    file = here / f"junk{suffix}"
    if suffix == ".frames":
        file.mkdir()
        (file / "000.png").write_bytes(content)
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--init.*junk"):
        Init.of(installed(MODALITIES)[modality].load(), file)


def test_a_share_of_one_step_is_refused(suite, here, model, picture):
    done = suite("fake", "a cat", "--model", model, "--init", picture, "--steps", 1)
    assert done.code == 2 and "raise --steps" in done.err


def test_a_modality_without_such_a_thing(here, picture):
    with pytest.raises(ConfigError, match="the modality 3d cannot begin with a file"):
        Init.of(installed(MODALITIES)["3d"].load(), picture)


def test_the_library_takes_a_file_too(here, model, picture):
    from suite import Engine

    with Engine.from_recipe({"steps": 10}, modality="fake", model=str(model)) as engine:
        result = engine.generate("a cat", init=engine.init(picture, 0.0))
        assert result.artifacts[0].tobytes() == pixels(picture)
        assert engine.init(picture).strength == 0.6
