"""A plugin of another distribution, written from docs/plugins/authoring.md alone, is installed, listed and passes.

The files are taken from the page itself: every code block with a title is the file of that name.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plugins" / "authoring.md").read_text(encoding="utf-8")
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)
FILES = {b["title"]: b["code"] for b in BLOCK.finditer(PAGE) if b["title"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, as somebody would write them down."""
    folder = tmp_path_factory.mktemp("suite-every-nth")
    for name, code in FILES.items():
        (folder / name).write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def target(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed it, without a network."""
    folder = tmp_path_factory.mktemp("target")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--no-cache-dir"]
    run([sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(folder), str(project)], project)
    return folder


def run(command: list[str], cwd: Path, *path: Path) -> str:
    """Standard output of a command that must succeed, with `path` in front of the modules of this process."""
    places = [*map(str, path), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_page_has_a_whole_distribution() -> None:
    assert set(FILES) == {"suite_every_nth.py", "pyproject.toml", "test_every_nth.py"}


def test_pip_installs_one_module(target: Path) -> None:
    installed = {p.name for p in target.iterdir() if p.name != "__pycache__"}
    assert installed == {"suite_every_nth.py", "suite_every_nth-0.1.0.dist-info"}


def test_it_is_found_without_being_imported(project: Path, target: Path) -> None:
    code = (
        "import sys, suite.host.discovery as d; e = d.installed()['every-nth']; "
        "print(e.origin, e.target, 'suite_every_nth' in sys.modules, 'torch' in sys.modules)"
    )
    out = run([sys.executable, "-c", code], project.parent, target)
    assert out.split("\n")[0] == "every-nth (suite-every-nth 0.1.0) suite_every_nth:EveryNth False False"


def test_it_is_listed_with_the_others(project: Path, target: Path) -> None:
    code = "import sys; from suite.cli import main; sys.argv = ['suite', 'plugins', 'list', '--json']; main()"
    rows = json.loads(run([sys.executable, "-c", code], project.parent, target))["plugins"]
    (row,) = [r for r in rows if r["name"] == "every-nth"]
    assert row["hooks"] == ["cache"] and row["version"] == "0.1.0" and "error" not in row
    assert "ddim" in [r["name"] for r in rows]


def test_its_own_test_passes(project: Path, target: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_every_nth.py"
    test.write_text(FILES["test_every_nth.py"])
    out = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)], tmp_path, target)
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 30, out


def test_the_other_code_blocks_are_python() -> None:
    fragments = [b["code"] for b in BLOCK.finditer(PAGE) if b["language"] == "python" and not b["title"]]
    assert len(fragments) >= 3
    for code in fragments:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = __import__(node.module, fromlist=[a.name for a in node.names])
                assert all(hasattr(module, a.name) for a in node.names)


def test_the_pages_rule_is_one() -> None:
    from suite.rules import Member, Verdict, check

    (code,) = [b["code"] for b in BLOCK.finditer(PAGE) if "ALONE = Rule" in b["code"]]
    scope: dict = {}
    exec(code, scope)
    chain = [Member(str(i), "cache", words) for i, words in enumerate(scope["ALONE"].parts)]
    (finding,) = check(chain, [scope["ALONE"]])
    assert finding.rule.verdict is Verdict.FORBID


def test_links_of_the_page_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+\.md)\)", PAGE):
        assert (ROOT / "docs" / "plugins" / link).resolve().is_file(), link
