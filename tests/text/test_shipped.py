"""The text models that ship: whole, small enough, and able to write."""

from __future__ import annotations

import pytest

from suite import Engine
from suite.cli import main
from suite.host.models import open_folder, shipped
from suite.modalities.text.vocabulary import PAD, words_of

MODELS = sorted(shipped("text"))


@pytest.mark.parametrize("name", MODELS)
def test_files_are_whole_and_small(name: str) -> None:
    folder = open_folder(name, "text")
    assert folder.hash == shipped("text")[name]["sha256"]
    files = list(folder.path.rglob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) < 24 * 2**20


@pytest.mark.parametrize("recipe", ["fast", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_it_writes_words(name: str, recipe: str) -> None:
    prompts = ["disaster (noun)", "speech: peace, nations"]
    with Engine.from_recipe(recipe, modality="text", model=name) as engine:
        first, again = (engine.generate(prompts, num=4).artifacts for _ in range(2))
    assert first == again
    assert sum(any(c.isalpha() for c in text) for text in first) >= 6, first
    assert len(set(first)) > 4


def test_a_prompt_is_all_that_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text", "disaster (noun)", "--steps", "4", "--start", "an event"]) == 0
    assert capsys.readouterr().out.startswith("an event")


@pytest.mark.parametrize("plugin", ["--compress=int8", "--cache=fora:interval=2", "--cache=first-block:threshold=0.5"])
def test_methods_act_on_it(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text", "disaster (noun)", "--steps", "8", plugin]) == 0, capsys.readouterr().err


def test_a_text_is_what_lies_between_paddings() -> None:
    assert words_of([PAD, PAD, 7, 8, PAD, 9]) == [7, 8]
    assert words_of([7, 8]) == [7, 8] and words_of([PAD, PAD]) == [] and words_of([]) == []


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun", "unipc", "euler-maruyama", "sde-dpmpp"])
def test_solvers_of_pictures_write_text(solver: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["text", "speech: peace, nations", "--model", "gloss-continuous", "--solver", solver, "--steps", "12"]
    assert main([*words, "--num", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and sum("nations" in line or "peace" in line for line in lines) >= 1, lines
