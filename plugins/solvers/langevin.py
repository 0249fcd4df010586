"""Annealed Langevin dynamics: some Langevin steps at each noise level of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._langevin import langevin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def carried(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor]:
    """x / alpha goes unchanged to the next level; from alpha = 0 it is infinite, and x / sigma does."""
    keep = noise.alpha(s) / noise.alpha(t)
    return (keep.where(keep.isfinite(), noise.sigma(s) / noise.sigma(t)),)


@dataclass(frozen=True)
class LangevinSolver(Solver):
    """`repeats` steps x + e score + sqrt(2 e) z at time s, e = size sigma_s^2; the last step is x0 itself.

    NCSN's step is a fixed part of sigma^2 at every level, alpha_i / 2 = (epsilon / 2 sigma_L^2) sigma_i^2. Finer grids
    do not remove the bias of steps of that size.
    """

    noise: NoiseSchedule
    repeats: int
    size: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=0, evaluations=self.repeats, stochastic=True, exact=False)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        if not is_regular(self.noise, s):
            return denoise(x, t), state
        x = combine(carried(self.noise, t, s), (x,))
        for _ in range(self.repeats):
            x = langevin(self.noise, denoise, x, s, self.size, rng)
        return x, state

    def evaluations(self, steps: int) -> int:
        """`repeats` a step, but 1 to sigma = 0."""
        to_clean = float(self.noise.sigma(0.0)) == 0
        return self.repeats * (steps - to_clean) + to_clean


@dataclass(frozen=True)
class Langevin(Plugin):
    """Song & Ermon 2019, algorithm 1, with the final denoising of Jolicoeur-Martineau 2021 (2009.05475).

    Args:
        repeats: Langevin steps at each level.
        size: of a step, relative to sigma^2; 0.1 is NCSN's for CIFAR-10, with 100 repeats.
    """

    repeats: int = 10
    size: float = 0.3

    summary = "annealed Langevin dynamics of NCSN, several evaluations a step"
    paper = "NCSN (1907.05600), algorithm 1"
    orders = "0"
    effects = frozenset({"stochastic-step", "repeated-evaluations"})

    def __post_init__(self) -> None:
        if not 2 <= self.repeats <= 1000:
            raise ConfigError(f"langevin: repeats = {self.repeats}: expected a whole number from 2 to 1000")
        if not 0 < self.size < 1:
            raise ConfigError(f"langevin: size = {self.size}: expected a number between 0 and 1")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return LangevinSolver(noise, self.repeats, self.size)
