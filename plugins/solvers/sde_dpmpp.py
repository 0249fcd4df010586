"""SDE-DPM-Solver++: exponential integrators of the reverse SDE with data prediction, one and two evaluations deep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._stochastic import posterior_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def two_step_weights(noise: NoiseSchedule, t: Tensor, s: Tensor, past: Tensor) -> tuple[Tensor, ...]:
    """Weights of x, x0 at t, x0 at the time before, and noise: x0 + (h / 2 h_before)(x0 - x0_before) in x0's place."""
    import torch

    lam_t, lam_s, lam_past = (noise.log_snr(u) / 2 for u in (t, s, past))
    half = (lam_s - lam_t) / (2 * (lam_t - lam_past))
    of_x, of_x0, fresh = (torch.as_tensor(w, dtype=torch.float64) for w in posterior_weights(noise, t, s))
    return of_x, of_x0 * (1 + half), -of_x0 * half, fresh


@dataclass(frozen=True)
class SDEDPMppSolver(Solver):
    """x_s = (sigma_s/sigma_t) e^-h x + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z, h the step in half log-SNR.

    The weights are the posterior's, so with D = x0 it is DDPM's ancestral step; the two-step form extrapolates D to
    the middle of the step, and mean and variance of Gaussian data are then of second order. Next to alpha = 0 or
    sigma = 0 the step is the first-order one.
    """

    noise: NoiseSchedule
    order: int

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(self.order, stochastic=True, multistep=self.order > 1)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        noise, x0, z = self.noise, denoise(x, t), rng.normal_like(x)
        known = (t, x0) if self.order > 1 and is_regular(noise, t) else None
        if state is None or not is_regular(noise, s):
            return combine(posterior_weights(noise, t, s), (x, x0, z)), known
        past, before = state
        return combine(two_step_weights(noise, t, s, past), (x, x0, before, z)), known


@dataclass(frozen=True)
class SDEDPMpp(Plugin):
    """Lu 2022, section 5 and appendix; the first-order form is DDPM's ancestral step.

    Args:
        order: 1, or 2 for the two-step form (2M).
    """

    order: int = 2

    summary = "SDE-DPM-Solver++ of order 1 or 2 (2M), one evaluation a step"
    paper = "DPM-Solver++ (2211.01095), section 5, eq. 18, 19"
    orders = "1-2"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ConfigError(f"sde-dpmpp: order = {self.order}: expected 1 or 2")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"stochastic-step", "multistep"} if self.order > 1 else {"stochastic-step"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return SDEDPMppSolver(noise, self.order)
