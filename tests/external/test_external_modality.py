"""A modality of another distribution, written from docs/plugins/modality.md alone, with every first-party plugin."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_external_plugin import BLOCK, ROOT, run

PAGE = (ROOT / "docs" / "plugins" / "modality.md").read_text(encoding="utf-8")
FILES = {b["title"]: b["code"] for b in BLOCK.finditer(PAGE) if b["title"]}

#: Run in a process that sees the installed distribution: each plugin in its hook, as the matrix of our own models does.
EVERY = """
import json, sys
from suite import Engine
from suite.host.discovery import installed
from suite.errors import SuiteError
from suite.host.manager import implemented_hooks
from suite.host.plan import make_plan
from suite.recipe import Named, Recipe

out = {}
for name, entry in sorted(installed().items()):
    cls = entry.load()
    for hook in sorted(implemented_hooks(cls)):
        named = Named(name, dict(cls.acting_options))
        chosen = {hook: named if hook in ("schedule", "solver") else (named,)}
        try:
            plan = make_plan("curves", overrides=Recipe(**chosen, steps=9, dtype="fp32"), model=sys.argv[1])
            with Engine(plan) as engine:
                (curve,) = engine.generate("a slow wave").artifacts
            out[f"{hook} {name}"] = f"{len(curve)} points"
        except SuiteError as error:
            out[f"{hook} {name}"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed it, without a network, and the model it needs."""
    project, folder = tmp_path_factory.mktemp("suite-curves"), tmp_path_factory.mktemp("target")
    for name, code in FILES.items():
        (project / name).write_text(code, encoding="utf-8")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--no-cache-dir"]
    run([sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(folder), str(project)], project)
    run([sys.executable, "make_model.py", str(folder / "curves-8")], project)
    return folder


def suite(target: Path, cwd: Path, *arguments: str) -> str:
    code = "import sys; from suite.cli import main; sys.exit(main())"
    return run([sys.executable, "-c", code, *arguments], cwd, target)


def test_the_page_has_a_whole_distribution() -> None:
    assert set(FILES) == {"suite_curves.py", "pyproject.toml", "make_model.py"}


def test_it_is_found_without_importing_torch(target: Path, tmp_path: Path) -> None:
    code = (
        "import sys, suite.host.discovery as d; e = d.installed(d.MODALITIES)['curves']; e.load(); "
        "print(e.origin, 'torch' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], tmp_path, target).strip() == "curves (suite-curves 0.1.0) False"


def test_the_command_writes_and_replays(target: Path, tmp_path: Path) -> None:
    model = ["--model", str(target / "curves-8")]
    chosen = [*model, "--recipe", "fast", "--cache", "fora", "--compress", "int8", "--size", "2"]
    out = json.loads(suite(target, tmp_path, "curves", "a slow wave", *chosen, "-o", "w.csv", "--json"))
    (report,) = out["reports"]
    assert out["files"] == ["w.csv"] and report["options"] == {"size": 2.0}
    assert {p["name"] for p in report["plugins"]} >= {"fora", "int8"}
    assert len((tmp_path / "w.csv").read_text().splitlines()) == 66
    again = json.loads(suite(target, tmp_path, "replay", "w.csv", *model, "--json"))
    assert again["identical"] is True


def test_every_first_party_plugin_works_or_says_why_not(target: Path, tmp_path: Path) -> None:
    cells = json.loads(run([sys.executable, "-c", EVERY, str(target / "curves-8")], tmp_path, target).splitlines()[-1])
    refused = {cell: text for cell, text in cells.items() if text != "64 points"}
    reasons = (
        "masked tokens", "one process", "steps tokens", "over tokens", "real vectors", "was fitted to another model",
        "looked for a U-Net", "one must still be computed", "every step has the full depth",
    )  # fmt: skip
    odd = {cell: text for cell, text in refused.items() if not any(reason in text for reason in reasons)}
    assert not odd, odd
    assert len(cells) - len(refused) >= 12
