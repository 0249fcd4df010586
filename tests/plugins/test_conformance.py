"""Every plugin in the distribution's own entry-point table passes the kit that third parties use."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from suite.host.discovery import Entry
from suite.testing import Check, parametrize_with_checks

ROOT = Path(__file__).resolve().parents[2]
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["suite"]
BROKEN: dict[str, str] = {}
PLUGINS: dict[str, type] = {}
for name, target in TABLE.items():
    try:
        PLUGINS[name] = Entry(name, target, "efficient-diffusion-suite", "this").load()
    except Exception as error:  # one that cannot be loaded must not hide the others
        BROKEN[name] = str(error)


#: Plugins of which nothing can be checked without a package that is not needed otherwise.
NEEDS = {"cache-dit": "cache_dit"}
LACKING = {name: package for name, package in NEEDS.items() if find_spec(package) is None}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_needed_is_installed(name: str) -> None:
    if name in LACKING:
        pytest.skip(f"{LACKING[name]} is not installed (extra `caches`): {name} is not checked")
    assert name in PLUGINS


@pytest.mark.parametrize("name", TABLE)
def test_loads(name: str) -> None:
    assert name not in BROKEN, BROKEN[name]


#: Checks that a plugin cannot pass, and why.
EXPECTED = {
    "perflow-solver_is_finite_at_both_ends": "its lines are extrapolated over a whole window, and bounded only for a "
    "network that was distilled to be straight there; the kit's is not",
    "t-gate-wrap_keeps_branches_apart": "what it keeps is the mean over the branches, by definition",
}


@parametrize_with_checks({n: p for n, p in PLUGINS.items() if n not in LACKING}, EXPECTED)
def test_conformance(check: Check) -> None:
    check()
