"""A plugin under test, one check of it, and the lists that checks register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from suite.diffusion.noise import (
    VE,
    Cosine,
    Flow,
    Laplace,
    Masked,
    NoiseSchedule,
    ResShift,
    Sigmoid,
    Sqrt,
    SubVP,
    TrigFlow,
    VPGamma,
    VPLinear,
    VPTable,
)
from suite.diffusion.noise import Uniform as UniformNoise
from suite.diffusion.schedule import Schedule
from suite.diffusion.solver import Solver
from suite.host.discovery import Entry
from suite.host.manager import Active, Manager
from suite.plugin import Plugin
from suite.testing.oracles import a_run

#: Every family of real-valued noise, one member each.
CONTINUOUS: tuple[NoiseSchedule, ...] = (
    VPLinear(), Cosine(), Sqrt(), Sigmoid(), Laplace(), VPTable.named("scaled_linear", 100), VPGamma(), SubVP(), VE(),
    Flow(), TrigFlow(), ResShift(),
)  # fmt: skip
#: The kinds of end points: alpha(1) > 0 and = 0, alpha = 1 throughout, sigma(0) > 0.
ENDS: tuple[NoiseSchedule, ...] = (VPLinear(), Cosine(), VE(), Flow(), TrigFlow(), Sqrt())
DISCRETE: tuple[NoiseSchedule, ...] = (Masked(), Masked("cosine"), UniformNoise())
#: How much more rounding than the plain network a lossless plugin may have.
LOSSLESS_FACTOR = 1.5


@dataclass(frozen=True)
class Subject:
    """A plugin under test, as the engine would hold it."""

    name: str
    plugin: Any

    @property
    def cls(self) -> type[Plugin]:
        return type(self.plugin)

    def manager(self, hook: str, plugin: Any = None) -> Manager:
        """A manager with this plugin alone, for one hook."""
        target = f"{self.cls.__module__}:{self.cls.__qualname__}"
        entry = Entry(self.name, target, "under test", "0")
        return Manager([Active(entry, plugin or self.plugin, hook, self.name)])

    def schedule(self, noise: NoiseSchedule, steps: int = 10) -> Schedule:
        """Its schedule for this noise."""
        return self.manager("schedule").schedule(noise, a_run(steps=steps))

    def solver(self, noise: NoiseSchedule, steps: int = 10) -> Solver:
        """Its solver for this noise."""
        return self.manager("solver").solver(noise, a_run(steps=steps))


@dataclass(frozen=True)
class Check:
    """One check of one plugin; call it."""

    plugin: str
    name: str
    run: Callable[[], None]

    @property
    def id(self) -> str:
        """`plugin-check`, as pytest shows it."""
        return f"{self.plugin}-{self.name}"

    def __call__(self) -> None:
        try:
            self.run()
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"plugin {self.plugin}, check {self.name}: {kind}{error}") from error


COMMON: list[Callable[[Subject], None]] = []
BY_HOOK: dict[str, list[Callable[[Subject], None]]] = {"schedule": [], "solver": [], "parallelize": [], "cache": []}
WRAP: list[Callable[[Subject, str], None]] = []


def common(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    COMMON.append(function)
    return function


def of(hook: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        BY_HOOK[hook].append(function)
        return function

    return register


def of_wraps(function: Callable[[Subject, str], None]) -> Callable[[Subject, str], None]:
    WRAP.append(function)
    return function
