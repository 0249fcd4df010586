"""Heun: second order, two evaluations a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.solver import Denoise, Solver, SolverFacts, expand, transfer

if TYPE_CHECKING:
    from torch import Tensor

    from suite.noise import NoiseSchedule
    from suite.rng import SampleRng
    from suite.run import Run


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
        alpha_t, sigma_t = self.noise.alpha(t), self.noise.sigma(t)
        alpha_s, sigma_s = self.noise.alpha(s), self.noise.sigma(s)
        if bool((alpha_t == 0).any()) or bool((sigma_s == 0).any()):
            return predicted, state
        first = (x - expand(alpha_t, x) * x0) / expand(sigma_t, x)
        second = (predicted - expand(alpha_s, x) * denoise(predicted, s)) / expand(sigma_s, x)
        stretch = alpha_s / alpha_t
        run = alpha_s * (sigma_s / alpha_s - sigma_t / alpha_t)
        return expand(stretch, x) * x + expand(run, x) * (first + second) / 2, state

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
    lossless = True
    effects = frozenset({"repeated-evaluations"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return HeunSolver(noise)
