"""Whatever is wrong with the request: exit code 2, one message that says what to do, and nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


def refused(suite, here: Path, words, *expected: str) -> None:
    """The command is refused, as text and as JSON, and leaves the current folder as it was."""
    before = sorted(here.rglob("*"))
    done = suite(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    for text in expected:
        assert text in done.err
    again = suite(*words, "--json")
    assert (again.code, again.err) == (2, "")
    assert again.json == {"error": done.err.removeprefix("error: ").rstrip("\n")}
    assert sorted(here.rglob("*")) == before


REQUESTS = {
    "empty prompt": ([""], ["the prompt is empty"]),
    "blank prompt": (["  \t"], ["the prompt is empty"]),
    "no prompt": ([], ["PROMPT"]),
    "no prompt file": (["@absent.txt"], ["absent.txt cannot be read"]),
    "prompt file is a folder": (["@."], ["prompt file . is not a regular file but a folder"]),
    "num 0": (["x", "--num", "0"], ["num = 0: expected at least 1"]),
    "negative seed": (["x", "--seed", "-1"], ["seed = -1"]),
    "large seed": (["x", "--seed", str(2**64)], ["seed = "]),
    "batch 0": (["x", "--batch", "0"], ["--batch 0: expected 1 to 10000"]),
    "steps 0": (["x", "--steps", "0"], ["steps = 0: expected a whole number from 1 to 10000"]),
    "steps in words": (["x", "--steps", "many"], ["--steps", "valid integer"]),
    "guidance out of range": (["x", "--guidance", "-2"], ["guidance = -2.0"]),
    "guidance that is no number": (["x", "--guidance", "nan"], ["guidance = nan"]),
    "unknown dtype": (["x", "--dtype", "fp8"], ["--dtype", "fp8", "bf16"]),
    "unknown device": (["x", "--device", "toaster"], ["--device 'toaster'"]),
    "device that is not here": (["x", "--device", "cuda:99"], ["--device cuda:99 is not here"]),
    "unknown option": (["x", "--stepz", "3"], ["--stepz", "--steps", "suite fake --help"]),
    "unknown plugin": (["x", "--solver", "ddmi"], ["unknown plugin 'ddmi'; did you mean ddim"]),
    "nothing like it": (["x", "--cache", "qqqqqq"], ["unknown plugin 'qqqqqq'; installed: "]),
    "no plugin name": (["x", "--cache", ":interval=2"], ["the name is missing"]),
    "unknown plugin option": (["x", "--cache", "fake-count:intervall=3"], ["did you mean interval"]),
    "half a plugin option": (["x", "--cache", "fake-count:interval"], ["expected name:key=value"]),
    "plugin option of a wrong type": (["x", "--cache", "fake-count:interval=two"], ["expected a whole number"]),
    "plugin option out of range": (["x", "--cache", "fake-count:interval=11"], ["from 1 to 10"]),
    "plugin option of no choice": (["x", "--cache", "fake-count:mode=odd"], ["expected one of plain, fancy"]),
    "plugin of another hook": (["x", "--cache", "ddim"], ["does not implement the hook 'cache'; use --solver"]),
    "plugin of another modality": (["x", "--cache", "fake-elsewhere"], ["does not support the modality 'fake'"]),
    "plugin that cannot be imported": (["x", "--cache", "fake-absent"], ["fake-modality 1.2", "fake_absent"]),
    "plugin named twice": (["x", "--cache", "fake-count", "--cache", "fake-count"], ["named twice"]),
    "plugin that crashes": (["x", "--cache", "fake-crash"], ["fake-crash", "the gear box is broken"]),
    "two solvers": (["x", "--solver", "ddim", "--solver", "heun"], ["--solver is given 2 times (ddim, heun)"]),
    "a cache that is a solver too": (
        ["x", "--cache", "fake-both"],
        ["two plugins for the hook 'solver'", "fake-both (fake-modality 1.2)", "dpmpp-2m"],
    ),
    "a lossy plugin in exact mode": (["x", "--cache", "fake-idle", "--exact"], ["--exact refuses", "fake-idle"]),
    "unknown recipe": (["x", "--recipe", "balancd"], ["no recipe 'balancd'; did you mean balanced"]),
    "wrong ending": (["x", "-o", "x.mp4"], ["cannot write .mp4", ".png"]),
    "no ending": (["x", "-o", "x"], ["a file without ending"]),
    "no such folder": (["x", "-o", "absent/x.png"], ["the folder absent does not exist", "mkdir -p absent"]),
    "a file as folder": (["x", "-o", "file/x.png"], ["file is a file, not a folder"]),
    "a device as folder": (["x", "-o", "/dev/full/x.png"], ["/dev/full is a file, not a folder"]),
    "no folder for the report": (["x", "--report", "absent/r.json"], ["the folder absent does not exist"]),
    "a folder as report": (["x", "--report", "."], ["is a folder; expected a file"]),
    "the report over the result": (["x", "-o", "x.png", "--report", "x.png"], ["also a result's file"]),
}


@pytest.mark.parametrize(("words", "expected"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_cannot_work(suite, here, model, words, expected):
    (here / "file").touch()
    refused(suite, here, ["fake", *words, "--model", model], *expected)


COMMANDS = {
    "unknown command": (["imag"], ["'imag'", "image"]),
    "unknown subcommand": (["plugins", "lst"], ["'lst'", "list"]),
    "unknown hook": (["plugins", "list", "--hook", "cahce"], ["cahce", "cache"]),
    "unknown plugin": (["plugins", "show", "ddmi"], ["did you mean ddim"]),
    "broken plugin": (["plugins", "show", "fake-absent"], ["fake-modality 1.2"]),
    "unknown model": (["models", "show", "emoji-46"], ["did you mean emoji-64"]),
    "unknown recipe": (["recipes", "show", "fats"], ["did you mean fast"]),
    "no model of a modality": (["fake", "x"], ["no model of the modality 'fake' is shipped", "--model FOLDER"]),
    "model of another modality": (["fake", "x", "--model", "emoji-64"], ["of the modality 'image', not 'fake'"]),
}


@pytest.mark.parametrize(("words", "expected"), COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_that_cannot_work(suite, here, words, expected):
    refused(suite, here, words, *expected)


def test_a_group_without_a_command(suite):
    done = suite("models")
    assert done.code == 2 and "`suite models --help`" in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data", "prepare", "fake"], "has no training data to prepare"),
        (["data", "prepare", "imag"], "did you mean image"),
        (["train", "fake", "--config", "c.yaml", "--data", "c.yaml"], "has no training code"),
        (["train", "fake", "--config", "absent.yaml"], "configuration absent.yaml cannot be read"),
        (["train", "fake", "--config", "c.yaml"], "suite data prepare fake"),
        (["train", "fake", "--config", "c.yaml", "--data", "absent"], "no training data absent"),
        (["train", "fake", "--config", "c.yaml", "--data", "c.yaml", "--minutes", "0"], "--minutes 0.0"),
        (["train", "fake", "--config", "c.yaml", "--data", "c.yaml", "--out", "a/b"], "the folder a does not exist"),
    ],
)
def test_work_that_cannot_be_done(suite, here, words, expected):
    (here / "c.yaml").write_text("{}")
    done = suite(*words)
    assert done.code == 2 and expected in done.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"caf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_a_prompt_file_that_cannot_work(suite, here, model, content, expected):
    (here / "p.txt").write_bytes(content)
    refused(suite, here, ["fake", "@p.txt", "--model", model], "prompt file p.txt", expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps: [", "not YAML"),
        ("", "expected a mapping"),
        ("- steps", "expected a mapping"),
        ("stepz: 4", "unknown key 'stepz'; did you mean steps"),
        ("steps: four", "steps = 'four'"),
        ("steps: true", "steps = True"),
        ("guidance: high", "guidance = 'high'"),
        ("guidance_interval: 3", "guidance_interval = 3"),
        ("guidance_interval: [0.1, x]", "guidance_interval"),
        ("cache: 3", "cache must be a list"),
        ("cache: [{fora: 2}]", "must be text like name:key=value"),
        ("modalities: 3", "modalities must map"),
        ("modalities: {fake: 3}", "modalities must map"),
        ("dtype: fp8", "dtype = 'fp8'"),
    ],
)
def test_a_recipe_that_cannot_work(suite, here, model, content, expected):
    (here / "r.yaml").write_text(content)
    done = suite("fake", "x", "--model", model, "--recipe", "r.yaml")
    assert done.code == 2 and expected in done.err, done.err
    assert [f.name for f in here.iterdir()] == ["r.yaml"]


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def reshape(model: Path) -> None:
    save_file({"weight": np.zeros((48, 47), np.float32), "bias": np.zeros(48, np.float32)}, model / "model.safetensors")


def drop(model: Path) -> None:
    save_file({"weight": np.zeros((48, 48), np.float32)}, model / "model.safetensors")


def change_facts(**changes):
    def act(model: Path) -> None:
        facts = json.loads((model / "suite.json").read_text()) | changes
        (model / "suite.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))

    return act


DAMAGE = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "truncated weights": (cut, "damaged or incomplete"),
    "weights of another shape": (reshape, "weight has shape (48, 47), Linear expects (48, 48)"),
    "a tensor is missing": (drop, "lacks 1 tensors of Linear, first bias"),
    "not a model folder": (lambda m: (m / "suite.json").unlink(), "is not a model folder: it has no suite.json"),
    "no folder": (shutil.rmtree, "no model"),
    "description is not JSON": (lambda m: (m / "suite.json").write_text("{"), "is not JSON"),
    "description is a list": (lambda m: (m / "suite.json").write_text("[]"), "expected an object"),
    "no modality": (change_facts(modality=None), "says nothing about 'modality'"),
    "no defaults": (change_facts(defaults=None), "says nothing about 'defaults'"),
    "wrong defaults": (change_facts(defaults=3), "defaults is 3, expected an object"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_model_that_cannot_be_opened(suite, here, model, damage, expected):
    damage(model)
    refused(suite, here, ["fake", "x", "--model", model], expected)


def full_disk(artifact, path, metadata):
    """Write some of the file, then meet a real device without space."""
    path.write_bytes(b"half a picture")
    with open("/dev/full", "wb") as stream:
        stream.write(b"the rest")


@pytest.fixture
def third_save_fails(suite, monkeypatch):
    suite("plugins", "list")  # puts the fixture on the path
    from fake_modality import Fake

    whole, count = Fake.save, iter(range(100))

    def save(self, artifact, path, metadata):
        (full_disk if next(count) == 2 else lambda *words: whole(self, *words))(artifact, path, metadata)

    monkeypatch.setattr(Fake, "save", save)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_leaves_what_is_finished_and_nothing_else(suite, here, model, third_save_fails):
    done = suite("fake", "x", "--num", 5, "--batch", 2, "--model", model)
    assert (done.code, done.out) == (2, "")
    assert "x-002.png could not be written: No space left on device" in done.err
    assert "2 of 5 finished and stay" in done.err
    assert sorted(f.name for f in here.iterdir()) == ["x-000.png", "x-001.png"]


def test_an_unexpected_error_is_short_and_says_how_to_see_more(suite, here, model, monkeypatch):
    from suite.cli import job as cli_job

    def crash(*words):
        raise KeyError("something else\nand more")

    monkeypatch.setattr(cli_job, "open_engine", crash)
    words = ["fake", "x", "--model", model]
    done = suite(*words)
    assert done.code == 1 and done.err.count("\n") == 1
    assert "KeyError" in done.err and "SUITE_DEBUG=1" in done.err
    monkeypatch.setenv("SUITE_DEBUG", "1")
    assert "Traceback" in suite(*words).err


def test_two_distributions_with_one_name(suite, here, tmp_path, monkeypatch):
    folder = tmp_path / "other" / "other_fake-3.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-fake\nVersion: 3\n")
    (folder / "entry_points.txt").write_text("[suite]\nfake-count = elsewhere:Count\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    refused(suite, here, ["plugins", "list"], "other-fake 3", "fake-modality 1.2", "SUITE_NO_PLUGINS=fake-count")
    monkeypatch.setenv("SUITE_NO_PLUGINS", "fake-count")
    assert suite("plugins", "list").code == 0


def test_a_missing_encoder_is_said_before_the_model_is_loaded(suite, here, model, monkeypatch):
    from fake_modality import Fake

    from suite.errors import ConfigError

    def check(suffix: str) -> None:
        raise ConfigError(f"no encoder for {suffix}")

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Fake, "check_suffix", staticmethod(check))
    monkeypatch.setattr(Fake, "__init__", load)
    (ending, *_) = Fake.suffixes
    refused(suite, here, ["fake", "x", "--model", model, "-o", f"x{ending}"], f"no encoder for {ending}")
