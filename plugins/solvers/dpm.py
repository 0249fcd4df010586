"""DPM-Solver 1, 2 and 3: single-step exponential Runge-Kutta methods on epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import (
    between,
    epsilon_weights,
    is_regular,
    noise_step_weights,
    phi,
    stopping_evaluations,
)

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def correction(noise: NoiseSchedule, t: Tensor, stop: Tensor, to: Tensor) -> tuple[Tensor]:
    """Weight of eps(stop) - eps(t) in the state at `to`: -sigma_to h phi_2(h) / r (algorithm 2).

    h is the step from t to `to` in half log-SNR, r the part of it at which the stop lies.
    """
    lam_t = noise.log_snr(t) / 2
    h = noise.log_snr(to) / 2 - lam_t
    part = (noise.log_snr(stop) / 2 - lam_t) / h
    return (-noise.sigma(to) * h * phi(2, h) / part,)


@dataclass(frozen=True)
class DPMSolver(Solver):
    """Taylor expansion of epsilon in half log-SNR, with stops inside the step in place of its derivatives.

    Order 1 is DDIM. Order 2 evaluates at the middle; order 3 at a third and at two thirds. From alpha = 0 and to
    sigma = 0 half log-SNR is infinite, and the step is DDIM's with one evaluation.
    """

    noise: NoiseSchedule
    order: int

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=self.order, evaluations=self.order)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, x0 = self.noise, denoise(x, t)
        if self.order == 1 or not is_regular(noise, t, s):
            return transfer(noise, x, x0, t, s), state

        def epsilon(x: Tensor, u: Tensor, x0: Tensor) -> Tensor:
            return combine(epsilon_weights(noise, u), (x, x0))

        def straight(epsilon: Tensor, to: Tensor) -> Tensor:
            return combine(noise_step_weights(noise, t, to), (x, epsilon))

        first = epsilon(x, t, x0)
        middle = between(noise, t, s, 1 / self.order)
        there = straight(first, middle)
        second = epsilon(there, middle, denoise(there, middle))
        if self.order == 2:
            return straight(second, s), state
        later = between(noise, t, s, 2 / 3)
        there = combine((1.0, *correction(noise, t, middle, later)), (straight(first, later), second - first))
        third = epsilon(there, later, denoise(there, later))
        return combine((1.0, *correction(noise, t, later, s)), (straight(first, s), third - first)), state

    def evaluations(self, steps: int) -> int:
        """`order` a step, but 1 from alpha = 0 and 1 to sigma = 0."""
        return stopping_evaluations(self.noise, self.order, steps)


@dataclass(frozen=True)
class DPM(Plugin):
    """Lu 2022, algorithms 1 and 2.

    Args:
        order: 1, 2 or 3; also the number of evaluations a step.
    """

    order: int = 3

    summary = "DPM-Solver of order 1, 2 or 3, as many evaluations a step"
    paper = "DPM-Solver (2206.00927), algorithms 1, 2"
    orders = "1-3"
    bench_options = ({"order": 2}, {"order": 3})

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ConfigError(f"dpm: order = {self.order}: expected 1, 2 or 3")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"repeated-evaluations"}) if self.order > 1 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DPMSolver(noise, self.order)
