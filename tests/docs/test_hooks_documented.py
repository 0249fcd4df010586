"""A hook is a promise: each has a page that shows it and a test that holds it."""

import ast
import re
from pathlib import Path

import pytest

import suite.hookspecs

ROOT = Path(__file__).resolve().parents[2]
HOOKS = sorted(name for name, value in vars(suite.hookspecs).items() if hasattr(value, "suite_spec"))


def test_the_five_hooks() -> None:
    assert HOOKS == ["cache", "compress", "parallelize", "schedule", "solver"]


@pytest.mark.parametrize("hook", HOOKS)
def test_has_a_page(hook: str) -> None:
    page = (ROOT / "docs" / "hooks" / f"{hook}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {hook}\n")
    shown = rf"^::: suite\.hookspecs\.{hook}$"
    assert re.search(shown, page, re.MULTILINE), "the page must show the docstring"


def test_no_page_without_a_hook() -> None:
    assert sorted(page.stem for page in (ROOT / "docs" / "hooks").glob("*.md")) == HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_has_a_test(hook: str) -> None:
    wanted = f"test_hook_{hook}"
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        # Parsed, so that a mention in a comment does not count.
        if wanted in text and any(
            isinstance(node, ast.FunctionDef) and node.name == wanted for node in ast.walk(ast.parse(text))
        ):
            return
    pytest.fail(f"no test is called {wanted}")
