"""Recipes: one grammar on the command line and in YAML, and errors that say what to type."""

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.diffusion.noise import FAMILIES
from suite.errors import ConfigError
from suite.host.models import TOKEN_FAMILIES, ModelFolder
from suite.recipe import Named, Recipe, from_options, read

NAMES = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).filter(str.strip)
VALUES = st.one_of(
    st.integers(-999, 999),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(string.ascii_letters + "._-", min_size=1, max_size=8),
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
)
NAMED = st.builds(Named, NAMES, st.dictionaries(NAMES, VALUES, max_size=3))


def test_hooks_come_in_the_hosts_order() -> None:
    from suite.hookspecs import HOOKS, SINGLE

    every = {hook: (Named("x"),) for hook in HOOKS if hook not in SINGLE} | {hook: Named("x") for hook in SINGLE}
    assert [hook for hook, _ in Recipe(**every).named()] == list(HOOKS)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("ddim", "ddim", {}),
        (" ddim ", "ddim", {}),
        ("ddim:eta=1", "ddim", {"eta": "1"}),
        ("fora:interval=2,parts=attention/mlp", "fora", {"interval": "2", "parts": "attention/mlp"}),
        ("x: a = 1 , b=2 ", "x", {"a": "1", "b": "2"}),
        ("x:url=a=b", "x", {"url": "a=b"}),
    ],
)
def test_grammar(text: str, name: str, options: dict[str, str]) -> None:
    assert Named.parse(text) == Named(name, options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the name is missing"),
        (":eta=1", "the name is missing"),
        ("ddim:", "got ''"),
        ("ddim:eta", "got 'eta'"),
        ("ddim:eta=", "got 'eta='"),
        ("ddim:=1", "got '=1'"),
        ("ddim:eta=1,", "got ''"),
        ("ddim:eta=1,eta=0", "'eta' is given twice"),
    ],
)
def test_grammar_errors(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Named.parse(text)


@given(NAMED)
@settings(database=None, deadline=None, max_examples=200)
def test_text_is_read_back(named: Named) -> None:
    once = Named.parse(str(named))
    assert once.name == named.name and list(once.options) == list(named.options)
    assert Named.parse(str(once)) == once
    assert str(once) == str(named)


RECIPES = st.builds(
    Recipe,
    name=NAMES,
    steps=st.none() | st.integers(1, 10_000),
    guidance=st.none() | st.floats(0, 100),
    guidance_interval=st.none() | st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
    dtype=st.sampled_from([None, "auto", "bf16", "fp32"]),
    schedule=st.none() | NAMED.map(str).map(Named.parse),
    solver=st.none() | NAMED.map(str).map(Named.parse),
    compress=st.lists(NAMED.map(str).map(Named.parse), max_size=2).map(tuple),
    parallelize=st.lists(NAMED.map(str).map(Named.parse), max_size=2).map(tuple),
    cache=st.lists(NAMED.map(str).map(Named.parse), max_size=2).map(tuple),
)


@given(RECIPES)
@settings(database=None, deadline=None, max_examples=200)
def test_yaml_is_read_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_command_line_and_yaml_are_equal() -> None:
    typed = from_options(
        solver="ddim:eta=0.5", schedule="uniform", cache=["fora:interval=2"], compress=["int8"], steps=20, guidance=3.0
    )
    written = Recipe.from_dict(
        yaml.safe_load(
            "{solver: 'ddim:eta=0.5', schedule: uniform, cache: 'fora:interval=2', compress: [int8], "
            "steps: 20, guidance: 3.0}"
        )
    )
    assert typed == written
    assert [(hook, str(n)) for hook, n in typed.named()] == [
        ("schedule", "uniform"),
        ("solver", "ddim:eta=0.5"),
        ("compress", "int8"),
        ("cache", "fora:interval=2"),
    ]


def test_over() -> None:
    base = from_options(solver="heun", cache=["fora"], steps=50, guidance=3.0)
    top = from_options(solver="ddim", guidance=0.0)
    assert top.over(base) == Recipe("custom", 50, 0.0, solver=Named("ddim"), cache=(Named("fora"),))
    assert from_options(cache=["first-block"]).over(base).cache == (Named("first-block"),)


def test_sections_override_for_their_modality() -> None:
    data = {"summary": "s", "steps": 20, "modalities": {"text": {"steps": 64, "solver": "unmask"}}}
    assert Recipe.from_dict(data).steps == 20
    assert Recipe.from_dict(data, "image") == Recipe(steps=20)
    assert Recipe.from_dict(data, "text") == Recipe(steps=64, solver=Named("unmask"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"step": 20}, r"unknown key 'step'.*did you mean steps"),
        ({"steps": 0}, "from 1 to 10000"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": "20"}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"guidance": -1}, "from 0 to 100"),
        ({"guidance": "much"}, "from 0 to 100"),
        ({"guidance_interval": [0.2]}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "guidance_interval"),
        ({"guidance_interval": ["a", "b"]}, "guidance_interval"),
        ({"dtype": "fp16"}, "auto, bf16 or fp32"),
        ({"solver": {"name": "ddim"}}, "solver must be text"),
        ({"cache": [1]}, "cache must be text"),
        ({"cache": 3}, "cache must be"),
        ({"modalities": ["text"]}, "modalities"),
        ({"modalities": {"image": 3}}, "modalities"),
    ],
)
def test_errors(data: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict(data, "image")


def test_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 8\nsolver: heun\n")
    assert read(str(file)) == Recipe("mine", 8, solver=Named("heun"))


@pytest.mark.parametrize(("content", "said"), [("[1, 2]", "expected a mapping"), ("a: [", "not YAML")])
def test_read_errors(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read(str(file))
    with pytest.raises(ConfigError, match="no recipe 'absent'"):
        read("absent")


def test_none_empties_a_list_of_the_recipe_below() -> None:
    below = Recipe(cache=(Named("fora"),), compress=(Named("int8"),))
    over = from_options(cache=["none"]).over(below)
    assert over.cache == () and over.compress == below.compress


def test_sections_for_one_modality_and_for_tokens():
    content = {
        "steps": 8,
        "solver": "ddim",
        "modalities": {"text": {"steps": 12, "solver": "heun"}},
        "tokens": {"solver": "unmask"},
    }
    assert Recipe.from_dict(content).to_dict() == {"name": "custom", "steps": 8, "solver": "ddim"}
    assert Recipe.from_dict(content, "text").to_dict() == {"name": "custom", "steps": 12, "solver": "heun"}
    over_tokens = Recipe.from_dict(content, "text", tokens=True)
    assert over_tokens.to_dict() == {"name": "custom", "steps": 12, "solver": "unmask"}
    with pytest.raises(ConfigError, match="tokens must be a section"):
        Recipe.from_dict({"tokens": ["unmask"]})


def test_a_model_over_tokens_is_known_without_torch(tmp_path):
    assert ModelFolder(tmp_path, {"noise": {"family": "masked"}}).tokens
    assert not ModelFolder(tmp_path, {"noise": {"family": "flow"}}).tokens
    assert not ModelFolder(tmp_path, {}).tokens
    assert set(TOKEN_FAMILIES) == {name for name, cls in FAMILIES.items() if cls.discrete}
