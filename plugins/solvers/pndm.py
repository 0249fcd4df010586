"""PNDM: classical linear multistep on epsilon with DDIM's transfer, and its start by pseudo Runge-Kutta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, transfer
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import epsilon_weights, is_regular, noise_step_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Start = Literal["runge-kutta", "lower-order"]
#: Adams-Bashforth of order 1 to 4 for equal steps, newest first (Liu 2022, eq. 9 and appendix).
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
HISTORY = 3


@dataclass(frozen=True)
class PNDMSolver(Solver):
    """x_s is DDIM's transfer of x with the extrapolated epsilon in place of its own.

    The transfer makes any epsilon an exact step on a point, but the combination is of second order only, as its
    coefficients are those of equal steps of another equation. Three pseudo Runge-Kutta steps of four evaluations
    give the history (PNDM), or lower orders do (iPNDM). From alpha = 0 the step is DDIM's.
    """

    noise: NoiseSchedule
    start: Start

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.start == "lower-order":
            return SolverFacts(order=2, multistep=True)
        # The step to sigma = 0 cannot be a Runge-Kutta step: there is no epsilon to evaluate at its end.
        return SolverFacts(order=2, evaluations=4, multistep=True, min_steps=HISTORY + 2)

    def init(self, run: Run) -> Any:
        del run
        return ()

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, x0 = self.noise, denoise(x, t)
        if not is_regular(noise, t):
            return transfer(noise, x, x0, t, s), ()
        epsilon = combine(epsilon_weights(noise, t), (x, x0))
        known = (epsilon, *state)
        if len(known) <= HISTORY and self.start == "runge-kutta":
            epsilon = self._runge_kutta(denoise, x, t, s, epsilon)
        else:
            epsilon = combine(ADAMS[len(known) - 1], known)
        return combine(noise_step_weights(noise, t, s), (x, epsilon)), known[:HISTORY]

    def _runge_kutta(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, first: Tensor) -> Tensor:
        """The classical four slopes, each stop reached by a transfer (eq. 13); three more evaluations."""
        noise, middle = self.noise, (t + s) / 2

        def at(u: Tensor, epsilon: Tensor) -> Tensor:
            there = combine(noise_step_weights(noise, t, u), (x, epsilon))
            return combine(epsilon_weights(noise, u), (there, denoise(there, u)))

        second = at(middle, first)
        third = at(middle, second)
        return combine((1 / 6, 1 / 3, 1 / 3, 1 / 6), (first, second, third, at(s, third)))

    def evaluations(self, steps: int) -> int:
        """One a step, and nine more for three Runge-Kutta steps."""
        return steps + (9 if self.start == "runge-kutta" else 0)


@dataclass(frozen=True)
class PNDM(Plugin):
    """Liu 2022: F-PNDM, and iPNDM (Zhang & Chen 2022) with `start=lower-order`.

    Args:
        start: `runge-kutta`, three steps of four evaluations; or `lower-order`, none.
    """

    start: Start = "runge-kutta"

    summary = "PNDM: four-point linear multistep on epsilon; iPNDM with start=lower-order"
    paper = "PNDM (2202.09778), eq. 9, 13; iPNDM: DEIS (2204.13902), section 4"
    orders = "2"
    effects = frozenset({"multistep", "repeated-evaluations"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return PNDMSolver(noise, self.start)
