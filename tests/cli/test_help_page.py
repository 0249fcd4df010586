"""docs/cli.md shows the help as it is. `SUITE_UPDATE_DOCS=1 pytest tests/cli/test_help_page.py` writes it anew."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest

from suite.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cli.md"
HEADING = "## All commands\n"
COMMANDS = (
    "",
    "image",
    "video",
    "audio",
    "text",
    "3d",
    "replay",
    "plugins list",
    "plugins show",
    "models list",
    "models show",
    "recipes list",
    "recipes show",
    "doctor",
    "schedule optimize",
    "cache calibrate",
    "cache show",
    "bench solvers",
    "bench caches",
    "bench quality",
    "data prepare",
    "train",
)


def fragment(capsys: pytest.CaptureFixture[str]) -> str:
    """The help of every command."""
    parts = []
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0
        name = f"suite {command}".strip()
        text = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
        parts.append(f"### {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def listed(capsys: pytest.CaptureFixture[str], *group: str) -> list[str]:
    main([*group, "--help"])
    return re.findall(r"^  ([a-z0-9]+)  ", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE)


def test_every_command_is_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    for name in listed(capsys):
        inner = listed(capsys, name)
        assert all(f"{name} {i}" in COMMANDS for i in inner) if inner else name in COMMANDS


def test_the_page_shows_the_help_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tested,) = re.findall(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if metadata.version("typer") != tested:
        pytest.skip(f"the page shows the help of typer {tested}")
    monkeypatch.setenv("COLUMNS", "100")
    text = PAGE.read_text(encoding="utf-8")
    before = text.partition(HEADING)[0]
    wanted = f"{before}{HEADING}\n{fragment(capsys)}"
    if os.environ.get("SUITE_UPDATE_DOCS"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "out of date; SUITE_UPDATE_DOCS=1 with this test writes it anew"
