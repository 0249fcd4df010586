"""DPM-Solver++(2M): second order, one evaluation a step, data prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class _Past:
    """The evaluation of the step before and its time."""

    x0: Tensor
    t: Tensor


@of_times
def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, past: Tensor) -> tuple[Tensor, ...]:
    """What x, x0 and the x0 at the time `past` are multiplied by."""
    lam_t, lam_s, lam_past = (noise.log_snr(time) / 2 for time in (t, s, past))
    extra = (lam_s - lam_t) / (2 * (lam_t - lam_past))
    extra = extra.where(extra.isfinite(), 0.0)
    of_x = noise.sigma(s) / noise.sigma(t)
    of_x0 = noise.alpha(s) - noise.alpha(t) * of_x
    return of_x, of_x0 * (1 + extra), -of_x0 * extra


@dataclass(frozen=True)
class DPMpp2MSolver(Solver):
    """x_s = (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) D, D = x0 + (h / 2 h_prev)(x0 - x0_prev).

    h is the step in half log-SNR. The factor of D is alpha_s (1 - e^-h) without its singularities: where
    alpha_t = 0 the next step's h_prev is infinite and D falls back to x0; the step to sigma_s = 0 takes D = x0,
    because extrapolating over an infinite h would diverge.
    """

    noise: NoiseSchedule
    facts = SolverFacts(order=2, multistep=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        x0 = denoise(x, t)
        if state is None:
            return transfer(self.noise, x, x0, t, s), _Past(x0, t)
        return combine(weights(self.noise, t, s, state.t), (x, x0, state.x0)), _Past(x0, t)


@dataclass(frozen=True)
class DPMpp2M(Plugin):
    """Lu 2022, algorithm 2."""

    summary = "DPM-Solver++(2M), second order, one evaluation a step"
    paper = "DPM-Solver++ (2211.01095), algorithm 2"
    orders = "2"
    effects = frozenset({"multistep"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DPMpp2MSolver(noise)
