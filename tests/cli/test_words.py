"""Values that are empty or no text, streams that are closed, and what only whole command lines decide."""

import subprocess
import sys

import pytest

OPTIONS = [
    "--output", "--model", "--num", "--seed", "--steps", "--guidance", "--guidance-interval", "--init", "--strength",
    "--schedule", "--solver", "--cache", "--cache-limit", "--compress", "--parallelize", "--recipe", "--dtype",
    "--device", "--batch", "--launch", "--report",
]  # fmt: skip
ELSEWHERE = [
    ["replay", "x.png", "--model", ""],
    ["replay", ""],
    ["cache", "show", "r.json", "--kind", ""],
    ["bench", "caches", "fake", "-o", ""],
    ["bench", "solvers", "fake", "--solver="],
    ["schedule", "optimize", "fake", "--method", ""],
    ["train", "fake", "--config", "x.yaml", "--out", ""],
    ["data", "prepare", "fake", "--cache", ""],
]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_empty_value_is_an_unset_variable(suite, option):
    outcome = suite("fake", "x", option, "")
    assert outcome.code == 2 and f"{option} is empty: is a variable of the shell unset?" in outcome.err


@pytest.mark.parametrize("words", ELSEWHERE, ids=" ".join)
def test_an_empty_value_is_one_in_every_command(suite, words):
    outcome = suite(*words)
    assert outcome.code == 2 and "is empty: is a variable of the shell unset?" in outcome.err


def test_an_empty_negative_prompt_is_none(suite, model):
    assert suite("fake", "x", "--model", model, "--negative", "").code == 0


@pytest.mark.parametrize("words", [["fake", "\udcff"], ["fake", "x", "-o", "\udcff.png"], ["replay", "\udcff.png"]])
def test_what_is_no_text_is_refused(suite, words):
    outcome = suite(*words)
    assert outcome.code == 2 and "is not UTF-8" in outcome.err


def run(text, *words):
    quoted = [sys.executable, "-m", "suite.cli", *words]
    return subprocess.run(["bash", "-c", f'"$@" {text}', "-", *quoted], capture_output=True, text=True, timeout=60)


def test_closed_and_full_streams_have_an_exit_code():
    closed = run(">&-", "recipes", "list")
    assert closed.returncode == 2 and closed.stderr.startswith("error: standard output is closed")
    full = run("> /dev/full", "recipes", "list")
    assert full.returncode == 2 and full.stderr.endswith("cannot be written: No space left on device\n")
    assert full.stderr.count("error") == 1
    silent = run("2>&-", "recipes", "show", "absent")
    assert (silent.returncode, silent.stdout) == (2, "")


def test_a_random_seed_is_told_and_recorded(suite, model):
    outcome = suite("fake", "x", "--model", model, "--seed", "random", "--num", 2, "--json")
    first, second = outcome.json["reports"][0]["seeds"]
    assert second == first + 1 and f"seed: {first}\n" in outcome.err


def test_the_interval_of_guidance_is_the_recipes(suite, model):
    outcome = suite("fake", "x", "--model", model, "--guidance-interval", "0.2,0.8", "--json")
    assert outcome.json["reports"][0]["recipe"]["guidance_interval"] == [0.2, 0.8]
    for wrong in ("0.8,0.2", "nan,1", "-1,1", "0,2", "1", "a,b", "0,1,1"):
        refused = suite("fake", "x", "--model", model, "--guidance-interval", wrong)
        assert refused.code == 2 and "guidance" in refused.err and "expected two times" in refused.err


def test_a_negative_prompt_without_guidance_is_a_warning(suite, model):
    outcome = suite("fake", "x", "--model", model, "--negative", "y", "--guidance", 1, "--json")
    assert any("the negative prompt does nothing" in w for w in outcome.json["reports"][0]["warnings"])
    assert "the negative prompt does nothing" in outcome.err
    outcome = suite("fake", "x", "--model", model, "--negative", "y", "--guidance", 2, "--json")
    assert not any("does nothing" in w for w in outcome.json["reports"][0]["warnings"])


def test_ranks_need_something_to_share(suite, model):
    refused = suite("fake", "x", "--model", model, "--launch", 2)
    assert refused.code == 2 and "name a plugin that shares the work out with --parallelize" in refused.err
    assert "expected 1 to 64" in suite("fake", "x", "--model", model, "--launch", 65).err


def test_a_rank_is_not_launched_again(suite, model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    refused = suite("fake", "x", "--model", model, "--launch", 2, "--parallelize", "cfg", "--guidance", 2)
    assert refused.code == 2 and "this process is a rank already" in refused.err
