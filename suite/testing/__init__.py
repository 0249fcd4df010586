"""What a plugin's author tests with: exact oracles, and a conformance kit that knows the five hooks.

from suite.testing import parametrize_with_checks

@parametrize_with_checks({"my-cache": MyCache})
def test_conformance(check):
    check()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.testing.checks import Check, checks_for, parametrize_with_checks
    from suite.testing.oracles import Euler, Gaussian, Mixture, PointMass, Tokens, drive, observed_order
    from suite.testing.tiny import Tiny

_HOME = {
    "Check": "checks", "checks_for": "checks", "parametrize_with_checks": "checks",
    "Euler": "oracles", "Gaussian": "oracles", "Mixture": "oracles", "PointMass": "oracles", "Tokens": "oracles",
    "drive": "oracles", "observed_order": "oracles", "Tiny": "tiny",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, because pytest imports this package at start-up wherever the suite is installed.
    if name in _HOME:
        return getattr(import_module(f"suite.testing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'suite.testing' has no attribute {name!r}")


__all__ = [
    "Check", "Euler", "Gaussian", "Mixture", "PointMass", "Tiny", "Tokens", "checks_for", "drive",
    "observed_order", "parametrize_with_checks",
]  # fmt: skip
