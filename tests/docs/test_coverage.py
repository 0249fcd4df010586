"""docs/coverage.md lists every surveyed technique once, in a state that can be checked."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coverage.md"
TECHNIQUES = 248
HEADER = "| ID | technique | hook | disposition | state | test |"
WORDS = {
    "schedule",
    "solver",
    "compress",
    "cache",
    "parallelize",
    "train",
    "adapt",
    "guidance",
    "modality",
    "framework",
}
STATE = re.compile(r"done|partly: \S.*|not yet(?:: .+)?|document only: \S.*")


def parse(text: str) -> list[tuple[str, list[str]]]:
    """(group, cells) of every technique; the summary table is not one of them."""
    rows, group, inside = [], "", False
    for line in text.splitlines():
        if line.startswith("## "):
            group = line[3:]
        if not line.startswith("|"):
            inside = False
        elif line == HEADER:
            inside = True
        elif inside and not line.startswith("|---"):
            rows.append((group, [cell.strip() for cell in line.strip("|").split("|")]))
    return rows


ROWS = parse(PAGE.read_text(encoding="utf-8"))


def problems(cells: list[str]) -> list[str]:
    """What is wrong with one row; empty if nothing."""
    if len(cells) != 6:
        return [f"{len(cells)} cells, expected 6"]
    _, technique, hooks, disposition, state, test = cells
    bad = []
    if not technique:
        bad.append("no name")
    if unknown := {re.sub(r" \(.*\)", "", hook) for hook in hooks.split(", ")} - WORDS:
        bad.append(f"unknown hook {sorted(unknown)}")
    if disposition not in ("I", "W", "W+I", "D"):
        bad.append(f"unknown disposition {disposition!r}")
    if not STATE.fullmatch(state):
        bad.append(f"unknown state {state!r}")
    if (disposition == "D") != state.startswith("document only"):
        bad.append("D and 'document only' go together")
    if state == "done" or state.startswith("partly"):
        named = re.fullmatch(r"`(tests/[^`]+\.py)`", test)
        if not named:
            bad.append(f"{state!r} needs a test file, got {test!r}")
        elif not (ROOT / named[1]).is_file():
            bad.append(f"{named[1]} does not exist")
    elif test != "-":
        bad.append(f"{state!r} names a test")
    return bad


def test_every_technique_is_listed() -> None:
    assert len(ROWS) == TECHNIQUES


def test_ids_are_unique_within_a_group() -> None:
    assert all(group for group, _ in ROWS)
    counts = Counter((group, cells[0]) for group, cells in ROWS)
    repeated = [key for key, count in counts.items() if count > 1]
    assert not repeated


def test_every_row_is_sound() -> None:
    bad = [f"{group}, {cells[0]}: {text}" for group, cells in ROWS for text in problems(cells)]
    assert not bad, "\n".join(bad)


def test_the_summary_adds_up() -> None:
    summary = re.compile(r"^\| (done|partly|not yet|document only|total) \| (\d+) \|$", re.MULTILINE)
    found = dict(summary.findall(PAGE.read_text(encoding="utf-8")))
    counted = Counter(cells[4].split(":")[0] for _, cells in ROWS)
    counted["total"] = len(ROWS)
    assert {state: int(count) for state, count in found.items()} == dict(counted)


@pytest.mark.parametrize(
    "cells",
    [
        ["1", "A", "solver", "I", "soon", "-"],
        ["1", "A", "sampler", "I", "not yet", "-"],
        ["1", "A", "solver", "X", "not yet", "-"],
        ["1", "A", "solver", "D", "not yet", "-"],
        ["1", "A", "solver", "D", "document only:", "-"],
        ["1", "A", "solver", "I", "done", "-"],
        ["1", "A", "solver", "I", "done", "`tests/absent.py`"],
        ["1", "A", "solver", "I", "not yet"],
    ],
)
def test_a_bad_row_is_found(cells: list[str]) -> None:
    assert problems(cells)
