"""Results, models and recipes of others: no path of theirs is taken, and nothing of theirs acts on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_replay import report, rewrite


@pytest.fixture
def result(suite, here, model):
    assert suite("fake", "a cat", "--seed", 5, "--model", model, "--cache", "fake-count", "-o", "cat.png").code == 0
    return here / "cat.png"


WRONG: dict[str, Any] = {
    "threads of too many": ({"threads": 100_000}, "threads is 100000, expected a whole number from 1 to 1024"),
    "no threads": ({"threads": 0}, "threads is 0"),
    "options that are a list": ({"options": [1]}, "options is [1], expected an object"),
    "a negative prompt that is a number": ({"negative": 5}, "negative is 5, expected a text"),
    "a seed of 2^64": ({"seeds": [2**64]}, "seeds[0] is 18446744073709551616, expected a whole number"),
    "a seed of 400 digits": ({"seeds": [10**400]}, "seeds[0] is a number of some 400 digits"),
    "a seed below 0": ({"seeds": [-1]}, "seeds[0] is -1"),
    "a seed that is true": ({"seeds": [True]}, "seeds[0] is true"),
    "a prompt that is a list": ({"prompts": [["a"]]}, 'prompts[0] is ["a"]'),
    "a device of another kind": ({"device": "meta"}, "device is 'meta', expected a device such as cpu or cuda:0"),
    "versions that are numbers": ({"versions": {"torch": 2}}, "versions.torch is 2"),
    "a start without a hash": ({"start": {"init": "x.png", "strength": 0.5}}, "nothing about 'start.sha256'"),
    "a start of no share": ({"start": {"init": "x", "sha256": "", "strength": 7}}, "start.strength is 7"),
    "numbers that are not finite": ({"seconds": float("nan")}, "holds nan, which is not a finite number"),
    "a version that is true": ({"report_version": True}, "report version true, expected 1"),
    "a recipe that is a text": ({"recipe": "fast"}, "recipe is 'fast', expected an object"),
    "steps of a recipe": ({"recipe": {"steps": 10**9}}, "steps = 1000000000"),
    "a plugin without a version": ({"plugins": [{"name": "ddim"}]}, "says nothing about 'plugins[0].version'"),
}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=WRONG.keys())
def test_metadata_is_as_strict_as_a_recipe(suite, here, model, result, change, expected):
    rewrite(result, report(**change))
    done = suite("replay", result, "--model", model)
    assert done.code == 2 and expected in done.err, done.err
    assert done.err.count("\n") == 1 and len(done.err) < 2000
    assert [p.name for p in here.iterdir()] == ["cat.png"]


def test_escapes_do_not_reach_the_terminal(suite, here, model, result):
    evil = "1\x1b]0;X\x07\u202e"
    rewrite(result, report(versions={"torch": evil, evil: evil}))
    done = suite("replay", result, "--model", model)
    assert done.code == 0 and "made with 1\\x1b]0;X\\x07\\u202e" in done.err
    assert not set(done.err) & {"\x1b", "\x07", "\u202e"}
    rewrite(result, report(model=evil))
    refused = suite("replay", result)
    assert refused.code == 2 and "\x1b" not in refused.err and "\\x1b]0;X" in refused.err


def names(suite, here, model, result, extra: Path) -> str:
    done = suite("replay", result, "--model", model, "-o", "again.png")
    assert not extra.exists()
    return f"{done.code} {done.err}"


@pytest.mark.parametrize("plugin", ["nirvana", "redi"])
def test_a_replay_writes_no_store(suite, here, model, result, tmp_path, plugin):
    """Formerly the folder that the metadata name was made and filled."""
    store = tmp_path / "theirs"
    rewrite(result, lambda c: report(recipe=c["suite"]["recipe"] | {"cache": [f"{plugin}:store={store}"]})(c))
    told = names(suite, here, model, result, store)
    assert f"warning: {plugin}:store=" in told and "is left out: a replay neither reads nor writes" in told


def test_a_run_that_used_a_store_is_told(suite, here, model, result, tmp_path):
    facts = {"name": "redi:store=x", "version": "1", "facts": {"hits": 1}}
    rewrite(result, report(plugins=[facts]))
    assert "redi began samples with states of a store" in suite("replay", result, "--model", model).err


PATHS = {
    "schedule": "grid:file=/etc/passwd",
    "cache": ["magcache:file=../calibration.json"],
    "compress": ["t-stitch:model=/some/model"],
}


@pytest.mark.parametrize(("hook", "value"), PATHS.items())
def test_paths_in_metadata_are_refused_unless_trusted(suite, here, model, result, hook, value):
    rewrite(result, lambda c: report(recipe=c["suite"]["recipe"] | {hook: value})(c))
    done = suite("replay", result, "--model", model)
    assert done.code == 2 and "names a file or a folder" in done.err and "add --trust" in done.err
    trusted = suite("replay", result, "--model", model, "--trust")
    assert trusted.code == 2 and "names a file or a folder" not in trusted.err  # it goes on, to what the file holds


def test_names_of_what_is_shipped_are_no_paths(suite, here, model, result):
    rewrite(result, lambda c: report(recipe=c["suite"]["recipe"] | {"schedule": "grid:file=gaussian-flow-10"})(c))
    done = suite("replay", result, "--model", model)
    assert done.code == 2 and "names a file" not in done.err  # it is read, and was fitted to another model


@pytest.mark.parametrize(
    "defaults",
    [{"cache": ["nirvana:store=STORE"]}, {"cache": ["redi:store=STORE"]}, {"schedule": "grid:file=/etc/passwd"}],
    ids=["nirvana", "redi", "grid"],
)
def test_defaults_of_a_model_may_not_name_paths(suite, here, model, tmp_path, defaults):
    store = tmp_path / "theirs"
    text = json.dumps(defaults).replace("STORE", str(store))
    facts = json.loads((model / "suite.json").read_text())
    facts["defaults"] |= json.loads(text)
    (model / "suite.json").write_text(json.dumps(facts))
    done = suite("fake", "x", "--model", model)
    assert done.code == 2 and "names a file or a folder; only you may" in done.err and "suite.json" in done.err
    assert not store.exists() and not list(here.iterdir())
