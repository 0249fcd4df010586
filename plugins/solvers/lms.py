"""LMS: the linear multistep method of k-diffusion, which is DEIS' rhoAB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers.deis import ORDERS, DEISSolver

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver
    from suite.run import Run


@dataclass(frozen=True)
class LMS(Plugin):
    """`deis:variable=rho` by the name under which it is known elsewhere.

    Args:
        order: 1 to 4.
    """

    order: int = 4

    summary = "LMS of k-diffusion: Adams-Bashforth of order 1 to 4 in sigma / alpha, the same as deis:variable=rho"
    paper = "DEIS (2204.13902), section 3.2, rhoAB"
    orders = "1-4"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"lms: order = {self.order}: expected 1, 2, 3 or 4")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"multistep"}) if self.order > 1 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DEISSolver(noise, self.order, "rho")
