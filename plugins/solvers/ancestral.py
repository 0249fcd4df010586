"""DDPM's ancestral sampling: the posterior's mean, and one of the two fixed variances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._stochastic import forward_weights, posterior_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Variance = Literal["fixed-small", "fixed-large"]


@of_times
def large_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """The posterior's mean with the forward kernel's deviation, DDPM's sqrt(beta); no noise at sigma_s = 0."""
    import torch

    of_x, of_x0, _ = (torch.as_tensor(w, dtype=torch.float64) for w in posterior_weights(noise, t, s))
    _, fresh = (torch.as_tensor(w, dtype=torch.float64) for w in forward_weights(noise, s, t))
    return of_x, of_x0, fresh.where(noise.sigma(s) > 0, 0.0)


@dataclass(frozen=True)
class AncestralSolver(Solver):
    """x_s = posterior mean of x_s given x and x0, plus deviation times z.

    fixed-small is the posterior's own deviation, right where all data are one point, and the same step as DDIM's
    at eta = 1; fixed-large is the forward kernel's, right where the data are standard normal.
    """

    noise: NoiseSchedule
    variance: Variance

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=1, stochastic=True, exact=self.variance == "fixed-small")

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        weights = posterior_weights if self.variance == "fixed-small" else large_weights
        return combine(weights(self.noise, t, s), (x, denoise(x, t), rng.normal_like(x))), state


@dataclass(frozen=True)
class Ancestral(Plugin):
    """Ho 2020, algorithm 2, for any continuous noise schedule and any grid.

    Args:
        variance: `fixed-small` is the posterior's, `fixed-large` the forward step's.
    """

    variance: Variance = "fixed-small"

    summary = "DDPM's ancestral sampling, first order; variance fixed-small or fixed-large"
    paper = "DDPM (2006.11239), algorithm 2, section 3.2"
    orders = "1"
    effects = frozenset({"stochastic-step"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return AncestralSolver(noise, self.variance)
