"""DPM-Solver++(3M): third order, one evaluation a step, data prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid, combine, transfer
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import data_weights, is_regular
from suite.plugins.solvers._final import SHORT, limited, one_less, steps_left

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

HISTORY = 2


@dataclass(frozen=True)
class _Past:
    """The evaluations before, newest first, and the steps left."""

    known: tuple[tuple[Tensor, Tensor], ...]
    left: int | None


@dataclass(frozen=True)
class DPMpp3MSolver(Solver):
    """x0 is the parabola in half log-SNR through the last three evaluations; its integral is exact.

    k-diffusion and diffusers add half of the parabola's quadratic term, which leaves them of second order
    (tests/plugins/test_multistep.py measures both). The first two steps have less history and a lower order; so
    have those next to alpha = 0 or sigma = 0, where half log-SNR is infinite, and the last two of a short run if
    wanted.
    """

    noise: NoiseSchedule
    lower_order_final: bool = False
    facts = SolverFacts(order=3, multistep=True)

    def begin(self, run: Run, times: Tensor) -> Any:
        """Nothing but the number of steps left, if it matters."""
        del run
        check_grid(self.facts, times)
        return _Past((), steps_left(times, self.lower_order_final, SHORT))

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        x0 = denoise(x, t)
        known, left = (state.known, state.left) if state else ((), None)
        if not is_regular(self.noise, t):
            return transfer(self.noise, x, x0, t, s), _Past((), one_less(left))
        past = _Past(((t, x0), *known)[:HISTORY], one_less(left))
        if not is_regular(self.noise, s):
            return transfer(self.noise, x, x0, t, s), past
        before = known[: limited(HISTORY + 1, left) - 1]
        weights = data_weights(self.noise, t, s, *(time for time, _ in before))
        return combine(weights, (x, x0, *(value for _, value in before))), past


@dataclass(frozen=True)
class DPMpp3M(Plugin):
    """Lu 2022, section 4, carried to third order.

    Args:
        lower_order_final: in runs of fewer than 15 steps the step before the last is of second order and the last of
            first, as in diffusers.
    """

    lower_order_final: bool = True

    summary = "DPM-Solver++(3M), third order, one evaluation a step"
    paper = "DPM-Solver++ (2211.01095), section 4"
    orders = "3"
    effects = frozenset({"multistep"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DPMpp3MSolver(noise, self.lower_order_final)
