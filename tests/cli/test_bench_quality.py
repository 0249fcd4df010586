"""`suite bench quality`: numbers of recipes over seeds, beside real content."""

from __future__ import annotations

import csv
import json

import pytest

QUALITY = ("bench", "quality", "fake")


@pytest.fixture
def measured(monkeypatch, here):
    """The fake modality with a number: mean brightness; and with real content."""
    import fake_modality
    import numpy as np

    def metrics(self, artifacts, prompts):
        return {"brightness": float(np.mean([np.asarray(a).mean() for a in artifacts])), "n": float(len(prompts))}

    monkeypatch.setattr(fake_modality.Fake, "metrics", metrics, raising=False)
    monkeypatch.setattr(fake_modality.Fake, "benchmark_prompts", classmethod(lambda cls: ("a cat", "a dog", "a fox")))
    monkeypatch.setattr(fake_modality.Fake, "ceiling", classmethod(lambda cls: {"brightness": 100.0}))


def test_recipes_side_by_side_with_their_spread(suite, here, model, measured):
    words = (*QUALITY, "--model", model, "--recipe", "fast", "--recipe", "reference", "--seeds", "0,1,2")
    done = suite(*words)
    assert done.code == 0, done.err
    record = json.loads((here / "quality.json").read_text())
    assert [(r["recipe"], r["seed"]) for r in record["rows"]] == [
        (n, s) for n in ("fast", "reference") for s in range(3)
    ]
    values = {r["seed"]: r["metrics"]["brightness"] for r in record["rows"] if r["recipe"] == "fast"}
    assert len(set(values.values())) == 3, "every seed is other noise"
    mean = sum(values.values()) / 3
    spread = (sum((v - mean) ** 2 for v in values.values()) / 2) ** 0.5
    lines = done.out.splitlines()
    assert lines[0].split() == ["number", "fast", "reference", "real"]
    (line,) = [line for line in lines if line.startswith("brightness")]
    assert f"{mean:.3g} ± {spread:.2g}" in line and line.split()[-1] == "100"
    with (here / "quality.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 6
    assert suite(*words).code == 2, "what lies there is not lost without a word"
    again = suite(*words[:-1], "0,1,2,3", "--resume", "--json")
    assert again.code == 0 and again.json["rows"][:6] == record["rows"] and len(again.json["rows"]) == 8


def test_own_prompts_have_no_ceiling(suite, model, measured):
    done = suite(*QUALITY, "--model", model, "--recipe", "fast", "--seeds", "4", "--prompt", "a cow", "--json")
    assert done.code == 0 and done.json["reference"] == {} and done.json["request"]["prompts"] == ["a cow"]
    assert done.json["rows"][0]["metrics"]["n"] == 1


@pytest.mark.parametrize(("words", "said"), [
    (("--seeds", "0,x"), "--seeds '0,x'"),
    (("--seeds", "-1"), "--seeds '-1'"),
    (("--batch", 0), "--batch 0"),
    (("--samples", 0), "--samples 0"),
    (("--recipe", "fsat"), "did you mean"),
    (("-o", "absent"), "the folder absent does not exist"),
    (("--device", "tpu"), "expected cpu"),
])  # fmt: skip
def test_bad_input_is_refused(suite, here, model, words, said):
    done = suite(*QUALITY, "--model", model, *words)
    assert done.code == 2 and said in done.err and not list(here.iterdir())
