"""Discovery: installed plugins are found without importing them, and a broken one hurts nobody else."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from suite.errors import ConfigError, PluginError
from suite.host.discovery import MODALITIES, Entry, find, installed
from suite.host.plan import broken_plugins

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
HEAVY = ("torch", "diffusers", "transformers", "triton")


@pytest.mark.parametrize(
    "code",
    [
        "import suite",
        "import suite; suite.hookimpl",
        "import suite.host.discovery; assert suite.host.discovery.installed()",
        "import suite.host.plan",
        "import suite.testing",
        "import suite.testing.pytest_plugin",
        "import suite.host.discovery as d; [d.find(n, d.installed()).load() for n in ('uniform', 'ddim', 'heun')]",
        "from suite.recipe import from_options; from suite.host.discovery import installed; "
        "from suite.host.manager import *; "
        "Manager(load(from_options(solver='ddim:eta=1', schedule='karras'), installed(), 'image'))",
    ],
)
def test_imports_no_heavy_library(code: str) -> None:
    ask = f"import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ask}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_first_party_plugins_come_by_the_same_door() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    found = {n: e.target for n, e in installed().items() if e.distribution == "efficient-diffusion-suite"}
    # Not equality: an editable install keeps the table of the day it was made.
    assert found and found.items() <= table["suite"].items(), "run pip install -e . again"
    assert "image" in installed(MODALITIES)


def test_installed_reads_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES / "success")
    monkeypatch.syspath_prepend(FIXTURES / "importerror")
    found = installed()
    assert found["good-solver"] == Entry("good-solver", "fixture_success:GoodSolver", "fixture-success", "1.0")
    assert list(found) == sorted(found)
    monkeypatch.setenv("SUITE_NO_PLUGINS", "good-solver,broken")
    assert not {"good-solver", "broken"} & installed().keys() and "good-cache" in installed()


def test_a_broken_entry_point_is_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES / "success")
    monkeypatch.syspath_prepend(FIXTURES / "importerror")
    found = installed()
    assert find("good-solver", found).load().__name__ == "GoodSolver"
    with pytest.raises(PluginError) as raised:
        find("broken", found).load()
    message = str(raised.value)
    assert "plugin broken (fixture-importerror 1.0) cannot be loaded from fixture_importerror:Broken" in message
    assert "No module named 'a_library_that_is_not_installed'" in message


def test_broken_ones_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES / "success")
    monkeypatch.syspath_prepend(FIXTURES / "importerror")
    with pytest.warns(UserWarning) as warned:
        broken = broken_plugins()
    assert {"absent", "broken"} <= broken.keys() and "good-solver" not in broken
    assert "fixture_no_such_module" in broken["absent"]
    assert any("broken (fixture-importerror 1.0)" in str(w.message) for w in warned)


def test_two_distributions_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES / "success")
    monkeypatch.syspath_prepend(FIXTURES / "duplicate")
    with pytest.raises(ConfigError) as raised:
        installed()
    message = str(raised.value)
    assert "'good-solver'" in message
    assert "fixture-success 1.0" in message and "fixture-duplicate 2.5" in message
    assert "SUITE_NO_PLUGINS=good-solver" in message
    monkeypatch.setenv("SUITE_NO_PLUGINS", "good-solver")
    assert "other-solver" in installed()


def test_one_distribution_found_twice_is_no_conflict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(FIXTURES / "success")
    monkeypatch.syspath_prepend(FIXTURES / "success")
    monkeypatch.syspath_prepend(tmp_path / "again")
    assert "good-solver" in installed()


def test_find_offers_the_nearest() -> None:
    entries = {n: Entry(n, "m:C", "d", "1") for n in ("ddim", "heun")}
    assert find("ddim", entries).name == "ddim"
    with pytest.raises(ConfigError, match="unknown plugin 'dim'; did you mean ddim"):
        find("dim", entries)
    with pytest.raises(ConfigError, match="unknown modality 'zzz'; installed: ddim, heun"):
        find("zzz", entries, "modality")
    with pytest.raises(ConfigError, match="installed: none"):
        find("zzz", {})
