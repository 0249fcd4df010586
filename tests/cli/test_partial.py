"""What a modality says about requests and results: warnings, prompts that it refuses, results without content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from suite import Engine
from suite.errors import ConfigError, EmptyError
from suite.host.discovery import MODALITIES, installed
from suite.host.replay import read

ASKED = ("--steps", "2", "--batch", "2")


@pytest.fixture
def fake(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Refuses prompts of `bad`, doubts those of `odd`."""
    cls = installed(MODALITIES)["fake"].load()

    def check(folder: Any, request: Any) -> None:
        for prompt in request.prompts:
            if "bad" in prompt:
                raise ConfigError(f"the prompt {prompt!r} is bad")

    def warnings(folder: Any, request: Any) -> list[str]:
        return [f"{prompt!r} is odd" for prompt in request.prompts if "odd" in prompt]

    monkeypatch.setattr(cls, "check", staticmethod(check))
    monkeypatch.setattr(cls, "warnings", staticmethod(warnings))
    return cls


def hollow(fake: Any, monkeypatch: pytest.MonkeyPatch, *seeds: int) -> None:
    """Results of these seeds are empty."""
    decode = fake.decode

    def marked(self: Any, x0: Any, request: Any) -> Any:
        out = decode(self, x0, request)
        for picture, seed in zip(out, self.seeds, strict=True):
            picture.info["hollow"] = seed in seeds
        return out

    def prior(self: Any, request: Any, rng: Any) -> Any:
        self.seeds = rng.seeds
        return plain(self, request, rng)

    plain = fake.prior
    monkeypatch.setattr(fake, "prior", prior)
    monkeypatch.setattr(fake, "decode", marked)
    monkeypatch.setattr(fake, "why_empty", lambda self, a: "nothing is in it" if a.info["hollow"] else "")


def test_warnings_are_printed_once_and_stand_in_the_report(fake, suite, model, here):
    done = suite("fake", "an odd thing", "--model", model, *ASKED, "--num", "3", "-o", "x.png", "--report", "r.json")
    assert done.code == 0 and done.err.splitlines() == ["warning: 'an odd thing' is odd"]
    reports = json.loads(Path("r.json").read_text())["reports"]
    assert [set(r["warnings"]) for r in reports] == [{"'an odd thing' is odd"}] * 2
    assert "'an odd thing' is odd" in read(Path("x-000.png")).report["warnings"]


def test_many_warnings_are_counted(fake, suite, model, here):
    Path("p.txt").write_text("".join(f"odd {k}\n" for k in range(14)))
    done = suite("fake", "@p.txt", "--model", model, "--steps", "2", "-o", ".")
    assert done.code == 0 and len(done.err.splitlines()) == 11
    assert done.err.splitlines()[-1] == "warning: and 4 more like these"


def test_a_refused_line_does_not_end_the_file(fake, suite, model, here):
    Path("p.txt").write_text("one\nbad line\ntwo\nthree\n")
    done = suite("fake", "@p.txt", "--model", model, *ASKED, "-o", ".")
    assert done.code == 2 and len(done.out.splitlines()) == 3
    assert done.err.splitlines() == [
        "error: the prompt 'bad line' is bad",
        "error: 1 refused; 3 of 3 finished and stay",
    ]
    made = [read(Path(line)).report["prompts"] for line in done.out.splitlines()]
    assert made == [["one", "two"], ["one", "two"], ["three"]]


def test_where_all_are_refused_nothing_is_made(fake, suite, model, here):
    Path("p.txt").write_text("bad one\nbad two\n")
    for prompt in ("@p.txt", "bad"):
        done = suite("fake", prompt, "--model", model, *ASKED, "-o", ".")
        assert done.code == 2 and not done.out and "is bad" in done.err
    assert [path.name for path in here.iterdir()] == ["p.txt"]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_empty_result_is_exit_code_3_and_the_others_stay(fake, suite, model, here, monkeypatch, as_json):
    hollow(fake, monkeypatch, 1)
    asked = ["--json"] if as_json else []
    done = suite("fake", "a thing", "--model", model, *ASKED, "--num", "4", "-o", "x.png", *asked)
    assert done.code == 3
    kept = ["x-000.png", "x-002.png", "x-003.png"]
    assert sorted(path.name for path in here.iterdir()) == kept
    told = "x-001.png (seed 1): nothing is in it"
    if as_json:
        assert done.json["files"] == kept and done.json["error"] == f"1 empty; 3 of 4 finished and stay; {told}"
        assert done.json["reports"][0]["warnings"] == ["sample 1 is empty: nothing is in it"]
        return
    assert done.out.splitlines() == kept
    assert done.err.splitlines() == [f"error: {told}", "error: 1 empty; 3 of 4 finished and stay"]


def test_an_empty_result_in_python(fake, model, here, monkeypatch):
    hollow(fake, monkeypatch, 0, 5)
    with Engine.from_recipe({"steps": 2}, modality="fake", model=str(model), device="cpu") as engine:
        result = engine.generate("a thing", num=3)
    assert result.report.warnings == ["sample 0 is empty: nothing is in it"]
    with pytest.raises(EmptyError, match="1 of 3 are empty, the others are saved: nothing is in it") as caught:
        result.save(here / "x.png")
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in here.iterdir()) == ["x-001.png", "x-002.png"]
