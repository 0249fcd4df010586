"""Heun: second order, two evaluations a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Weights of x, the predicted x_s, and its x0: x_s = (alpha_s / alpha_t) x + run (eps_t + eps_s) / 2.

    The first slope is in the prediction, (alpha_s / alpha_t) x + run eps_t, so half of that brings it in.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = noise.alpha(t), noise.sigma(t), noise.alpha(s), noise.sigma(s)
    second = alpha_s * (sigma_s / alpha_s - sigma_t / alpha_t) / (2 * sigma_s)
    return alpha_s / (2 * alpha_t), 0.5 + second, -alpha_s * second


@dataclass(frozen=True)
class HeunSolver(Solver):
    """The trapezoid rule in EDM's coordinates y = x / alpha over r = sigma / alpha, where dy/dr = eps.

    Where alpha_t = 0 those coordinates are infinite, and where sigma_s = 0 the second slope is; both steps
    are Euler's, with one evaluation.
    """

    noise: NoiseSchedule
    facts = SolverFacts(order=2, evaluations=2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        x0 = denoise(x, t)
        predicted = transfer(self.noise, x, x0, t, s)
        if not is_regular(self.noise, t, s):
            return predicted, state
        return combine(weights(self.noise, t, s), (x, predicted, denoise(predicted, s))), state

    def evaluations(self, steps: int) -> int:
        """2 a step, but 1 for the step to sigma = 0 and 1 for a step from alpha = 0."""
        from_pure_noise = float(self.noise.alpha(1.0)) == 0
        to_clean = float(self.noise.sigma(0.0)) == 0
        return 2 * steps - min(steps, from_pure_noise + to_clean)


@dataclass(frozen=True)
class Heun(Plugin):
    """Karras 2022, algorithm 1 without churn, for any noise schedule."""

    summary = "Heun of EDM, second order, two evaluations a step"
    paper = "EDM (2206.00364), algorithm 1"
    orders = "2"
    effects = frozenset({"repeated-evaluations"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return HeunSolver(noise)
