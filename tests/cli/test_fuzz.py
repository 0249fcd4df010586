"""Whole command lines of nonsense: one message, an exit code that says what it is, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suite.cli import bench as cli_bench
from suite.cli import cache as cli_cache
from suite.cli import job as cli_job
from suite.cli import main
from suite.cli import schedule as cli_schedule
from suite.errors import ConfigError
from suite.files.printable import MESSAGE

NUMBERS = ["0", "-1", "1", "2", "8", "0.5", "1e999", "-inf", "nan", "9" * 19, "9" * 400, "9" * 5000, "1_0", "0x10", "٣"]
TEXTS = ["", " ", "x", "none", "@", "@@x", "@.", "@absent", "/dev/zero", ".", "..", "n" * 300, "\udcff", "\x1b]0;t\x07"]
PLUGINS = [
    "ddim",
    "uniform",
    "fora",
    "fora:",
    "fora:interval",
    "fora:interval=2",
    "grid:file=.",
    "karras:rho=7",
    ":",
    ",",
]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *PLUGINS]) | st.text(max_size=12)
PLUGIN = st.builds("{}:{}={}".format, st.sampled_from(PLUGINS), st.sampled_from(["interval", "order", "file"]), VALUES)
OPTIONS = st.sampled_from(
    [
        "--output", "--model", "--num", "--seed", "--steps", "--guidance", "--guidance-interval", "--negative",
        "--init", "--strength", "--schedule", "--solver", "--cache", "--cache-limit", "--compress", "--parallelize",
        "--recipe", "--dtype", "--device", "--batch", "--launch", "--report", "--samples", "--check", "--reference",
        "--evaluations", "--rounds", "--prompt", "--method", "--kind", "--part", "--config", "--data", "--minutes",
        "--size", "--nonsense",
    ]
)  # fmt: skip
OWN = st.sampled_from(
    [
        "--output", "--num", "--seed", "--steps", "--guidance", "--guidance-interval", "--negative", "--init",
        "--strength", "--schedule", "--solver", "--cache", "--cache-limit", "--compress", "--parallelize", "--recipe",
        "--dtype", "--device", "--batch", "--launch", "--report",
    ]
)  # fmt: skip
FLAGS = st.sampled_from(["--exact", "--json", "--hold-seed", "--allow-noop", "--metric", "--"])
COMMANDS = st.sampled_from(
    [
        *[["fake"]] * 6, ["replay"], ["plugins", "show"], ["models", "show"], ["recipes", "show"],
        ["cache", "show"], ["cache", "calibrate"], ["schedule", "optimize"], ["bench", "solvers", "fake"],
        ["bench", "caches", "fake"], ["train", "fake"], ["nonsense"], [],
    ]
)  # fmt: skip
WORDS = st.lists(st.tuples(OPTIONS, VALUES | PLUGIN).map(list) | FLAGS.map(lambda f: [f]) | VALUES.map(lambda v: [v]))


@pytest.fixture
def never_loaded(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a command line of the fake modality needs to be whole; no model is ever loaded."""

    def refuse(*arguments: object) -> None:
        raise ConfigError("a model would be loaded now")

    monkeypatch.setattr(cli_job.Job, "run", refuse)
    for module in (cli_bench, cli_cache, cli_schedule):
        monkeypatch.setattr(module, "open_engine", refuse)
    return ["--model", str(model)]


def check(words: list[str], run: Callable[[], tuple[int, str, str]], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = run()
    assert code in (0, 2, 3), (words, out, err)
    assert "Traceback" not in out + err and "SUITE_DEBUG" not in out + err
    if code:
        told = [line for line in err.splitlines() if line.startswith("error")] or out.splitlines()
        assert len(told) == 1, (words, out, err)
        assert len((out + err).encode()) < MESSAGE + 2000  # a warning may stand before it
        assert "\x1b" not in out + err
    assert sorted(folder.rglob("*")) == before, words


def fuzz(examples: int, whole: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(COMMANDS, st.lists(st.tuples(OWN, VALUES | PLUGIN), min_size=1, max_size=2), WORDS)
    def lines(command: list[str], own: list[tuple[str, str]], words: list[list[str]]) -> None:
        # A request that is whole but for one or two values, or anything at all.
        if command == ["fake"]:
            line = ["fake", "x", *whole, *(word for pair in own for word in pair)]
        else:
            line = [*command, *(word for part in words for word in part)]

        def run() -> tuple[int, str, str]:
            capsys.readouterr()
            code = main(line)
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        check(line, run, folder)

    lines()


def test_nonsense_is_refused(never_loaded: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(120, never_loaded, here, capsys)


@pytest.mark.slow
def test_much_nonsense_is_refused(never_loaded: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(5000, never_loaded, here, capsys)
