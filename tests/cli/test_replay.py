"""`suite replay`: a result makes itself again, bit for bit, and says what has changed when it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file


@pytest.fixture
def result(suite, here, model):
    """The second of three pictures of one batch."""
    words = ["fake", "a cat", "--num", 3, "--seed", 5, "--negative", "dogs", "--guidance", 2, "--solver", "ddim:eta=1"]
    assert suite(*words, "--model", model, "--cache", "fake-count", "-o", "cat.png").code == 0
    return here / "cat-001.png"


def rewrite(file: Path, change) -> None:
    """Give a picture other metadata."""
    with Image.open(file) as picture:
        picture.load()
        content = json.loads(picture.info["suite"])
    info = PngInfo()
    info.add_itxt("suite", json.dumps(change(content)))
    picture.save(file, pnginfo=info)


def report(**changes):
    return lambda content: content | {"suite": content["suite"] | changes}


def test_the_same_picture_bit_for_bit(suite, here, model, result):
    done = suite("replay", result, "--model", model)
    assert (done.code, done.out) == (0, f"{result.with_name('cat-001-replay.png')} is bit-identical to {result}\n")
    assert done.err == ""
    with Image.open(result) as first, Image.open(here / "cat-001-replay.png") as second:
        assert first.tobytes() == second.tobytes()
    again = suite("replay", here / "cat-001-replay.png", "--model", model, "-o", "third.png", "--json")
    assert again.code == 0
    assert again.json == {"identical": True, "files": ["third.png"], "warnings": []}


def test_another_picture_is_told_apart(suite, here, model, result):
    with Image.open(result) as picture:
        picture.load()
    info = PngInfo()
    info.add_itxt("suite", picture.info["suite"])
    content = bytearray(picture.tobytes())
    content[0] ^= 1
    Image.frombytes("RGB", picture.size, bytes(content)).save(result, pnginfo=info)
    done = suite("replay", result, "--model", model)
    assert done.code == 1 and "differs from" in done.out


def test_other_weights_and_versions_are_named(suite, here, model, result):
    rewrite(result, report(versions={"torch": "1.0", "gone-package": "2"}, world=2))
    weight = np.eye(48, dtype=np.float32)
    save_file({"weight": weight, "bias": np.zeros(48, np.float32)}, model / "model.safetensors")
    done = suite("replay", result, "--model", model, "--json")
    assert done.code == 1 and not done.json["identical"]
    text = "\n".join(done.json["warnings"])
    assert "the file was made with 1.0" in text
    assert "gone-package is not installed, the file was made with 2" in text
    assert "model fake-4 has weights" in text
    assert "on 1 rank, the file was made on 2" in text


def test_another_version_of_a_plugin_is_named(suite, here, model, result):
    def older(content):
        plugins = [p | {"version": "1.1"} if p["name"].startswith("fake") else p for p in content["suite"]["plugins"]]
        return report(plugins=plugins)(content)

    rewrite(result, older)
    done = suite("replay", result, "--model", model)
    assert done.code == 0
    assert "plugin fake-count is of fake-modality 1.2, the file was made with 1.1" in done.err


def test_threads_come_back(suite, here, model, result):
    import torch

    before = torch.get_num_threads()
    rewrite(result, report(threads=1))
    assert suite("replay", result, "--model", model).code == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: {}, "holds no report"),
        (lambda c: [], "holds no report"),
        (lambda c: c | {"index": "1"}, "holds no report"),
        (lambda c: c | {"index": 3}, "3 prompts, 3 seeds and row 3"),
        (report(report_version=99), "report version 99"),
        (report(seeds=[1]), "3 prompts, 1 seeds"),
        (report(prompts=None), "prompts is null, expected a list"),
        (report(plugins=[1]), "plugins[0] is 1, expected an object with name, version"),
        (report(modality="smell"), "modality 'smell', which is not installed"),
        (report(recipe={"stepz": 3}), "unknown key 'stepz'"),
        (report(recipe={"solver": "ddmi"}), "unknown plugin 'ddmi'"),
        (report(dtype="fp8"), "dtype = 'fp8'"),
    ],
)
def test_metadata_that_cannot_work(suite, here, model, result, change, expected):
    rewrite(result, change)
    before = sorted(here.iterdir())
    done = suite("replay", result, "--model", model)
    assert done.code == 2 and expected in done.err, done.err
    assert sorted(here.iterdir()) == before


def test_files_that_cannot_work(suite, here, model, result):
    assert "absent.png cannot be read: No such file" in suite("replay", "absent.png").err
    (here / "x.xyz").write_text("x")
    assert "no installed modality reads .xyz" in suite("replay", "x.xyz").err
    Image.new("RGB", (4, 4)).save(here / "plain.png")
    assert "was not made by this suite" in suite("replay", "plain.png").err
    result.write_bytes(result.read_bytes()[:-60])
    assert suite("replay", result, "--model", model).code == 2
    assert (
        "made with the model 'fake-4', which is not shipped; add --model" in suite("replay", here / "cat-000.png").err
    )
    done = suite("replay", here / "cat-000.png", "--model", model, "-o", "absent/x.png")
    assert done.code == 2 and "the folder absent does not exist" in done.err
