"""`--compress t-stitch` and `experts` through the command: two models of one kind, and what keeps them from a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file


@pytest.fixture
def other(model: Path) -> Path:
    """Another model of the same kind."""
    folder = model.with_name("other")
    shutil.copytree(model, folder)
    weight = np.random.default_rng(1).normal(0, 0.1, (48, 48)).astype(np.float32)
    save_file({"weight": weight, "bias": np.ones(48, np.float32)}, folder / "model.safetensors")
    facts = json.loads((folder / "suite.json").read_text())
    (folder / "suite.json").write_text(json.dumps(facts | {"name": "other-4"}))
    return folder


def draw(suite, *words):
    done = suite("fake", "a cat", "--steps", 4, "--schedule", "uniform", "-o", "out.png", "--json", *words)
    assert done.code == 0, done.out
    with Image.open("out.png") as picture:
        return picture.tobytes(), done.json["reports"][0]


def test_two_models_share_a_run(suite, here, model, other):
    large, small = draw(suite, "--model", model)[0], draw(suite, "--model", other)[0]
    results = {}
    for share, calls in (("0.25", 1), ("0.5", 2), ("1", 4)):
        results[share], report = draw(suite, "--model", model, "--compress", f"t-stitch:model={other},share={share}")
        plugin = report["plugins"][-1]
        assert (plugin["did"], report["nfe"], plugin["facts"]["models"][0]["name"]) == (calls, 4, "other-4")
    assert results["1"] == small != large and results["0.5"] not in (small, large)
    twin, _ = draw(suite, "--model", model, "--compress", f"t-stitch:model={model},share=0.5")
    assert twin == large
    experts, report = draw(suite, "--model", model, "--compress", f"experts:models={other},bounds=0.5")
    assert experts == results["0.5"] and report["plugins"][-1]["did"] == 2


def test_the_same_again(suite, here, model, other):
    draw(suite, "--model", model, "--compress", f"t-stitch:model={other},share=0.5")
    assert suite("replay", "out.png", "--model", model, "--trust").code == 0


def test_nothing_handed_over_is_an_error(suite, here, model, other):
    done = suite("fake", "x", "--model", model, "--steps", 4, "--compress", f"t-stitch:model={other},share=0")
    assert done.code == 3 and "share = 0 of the steps is none" in done.err


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"noise": {"family": "ve"}}, "its noise is {'family': 've'}, not not given"),
        ({"shape": [3, 8, 8]}, "its shape is [3, 8, 8]"),
        ({"prediction": "epsilon"}, "its prediction is epsilon"),
        ({"text": {"length": 7}}, "its text is {'length': 7}"),
        ({"guidance_distilled": True}, "its guidance_distilled is True"),
        ({"modality": "image"}, "is of the modality 'image'"),
    ],
)
def test_models_that_differ_are_refused_before_they_are_loaded(suite, here, model, other, facts, expected):
    written = json.loads((other / "suite.json").read_text())
    (other / "suite.json").write_text(json.dumps(written | facts))
    (other / "model.safetensors").unlink()
    (model / "model.safetensors").unlink()
    done = suite("fake", "x", "--model", model, "--compress", f"t-stitch:model={other}")
    assert done.code == 2 and expected in done.err, done.err
    assert not list(here.iterdir())


def test_a_model_that_is_not_there(suite, here, model):
    done = suite("fake", "x", "--model", model, "--compress", "t-stitch:model=absent")
    assert done.code == 2 and "no model 'absent'" in done.err
    done = suite("fake", "x", "--model", model, "--compress", "t-stitch")
    assert done.code == 2 and "option 'model' is required" in done.err
