"""Efficient diffusion suite: one host, five hooks, five modalities.

from suite import Engine
result = Engine.from_recipe("balanced", modality="image").generate("a red apple")
result.save("apple.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from suite.hookspecs import hookimpl, hookspec

if TYPE_CHECKING:
    from suite.call import Call
    from suite.engine import Engine, Result
    from suite.network import Network
    from suite.noise import NoiseSchedule
    from suite.patch import Patches
    from suite.plugin import Plugin
    from suite.recipe import Recipe
    from suite.report import RunReport
    from suite.run import Run
    from suite.schedule import Schedule
    from suite.solver import Solver, SolverFacts
    from suite.wrap import Wrap, WrapReport

_HOME = {
    "Call": "call", "Engine": "engine", "Result": "engine", "Network": "network", "NoiseSchedule": "noise",
    "Patches": "patch", "Plugin": "plugin", "Recipe": "recipe", "RunReport": "report", "Run": "run",
    "Schedule": "schedule", "Solver": "solver", "SolverFacts": "solver", "Wrap": "wrap", "WrapReport": "wrap",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Names load their module on first use: `import suite` must not import torch.
    if name in _HOME:
        return getattr(import_module(f"suite.{_HOME[name]}"), name)
    raise AttributeError(f"module 'suite' has no attribute {name!r}")


__all__ = [
    "Call", "Engine", "Network", "NoiseSchedule", "Patches", "Plugin", "Recipe", "Result", "Run", "RunReport",
    "Schedule", "Solver", "SolverFacts", "Wrap", "WrapReport", "hookimpl", "hookspec",
]  # fmt: skip
