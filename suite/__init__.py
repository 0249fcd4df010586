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
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.schedule import Schedule
    from suite.diffusion.solver import Solver, SolverFacts
    from suite.engine.engine import Engine, Result
    from suite.network import Network
    from suite.network.patch import Patches
    from suite.observe.report import RunReport
    from suite.plugin import Plugin
    from suite.recipe import Recipe
    from suite.run import Run
    from suite.wrap import Wrap, WrapReport

_HOME = {
    "Call": "call",
    "Engine": "engine.engine",
    "Result": "engine.engine",
    "Network": "network",
    "NoiseSchedule": "diffusion.noise",
    "Patches": "network.patch",
    "Plugin": "plugin",
    "Recipe": "recipe",
    "RunReport": "observe.report",
    "Run": "run",
    "Schedule": "diffusion.schedule",
    "Solver": "diffusion.solver",
    "SolverFacts": "diffusion.solver",
    "Wrap": "wrap",
    "WrapReport": "wrap",
}


def __getattr__(name: str) -> Any:
    # Names load their module on first use: `import suite` must not import torch.
    if name in _HOME:
        return getattr(import_module(f"suite.{_HOME[name]}"), name)
    raise AttributeError(f"module 'suite' has no attribute {name!r}")


__all__ = [
    "Call", "Engine", "Network", "NoiseSchedule", "Patches", "Plugin", "Recipe", "Result", "Run", "RunReport",
    "Schedule", "Solver", "SolverFacts", "Wrap", "WrapReport", "hookimpl", "hookspec",
]  # fmt: skip
