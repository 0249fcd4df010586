"""DDIM: the first-order solver, deterministic at eta = 0 and DDPM's ancestral step at eta = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, eta: Tensor | float) -> tuple[Tensor, ...]:
    """What x, x0 and fresh noise are multiplied by."""
    alpha_t, sigma_t, alpha_s, sigma_s = noise.alpha(t), noise.sigma(t), noise.alpha(s), noise.sigma(s)
    ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
    fresh = eta * sigma_s * (1 - ratio**2).clamp(min=0).sqrt()
    of_x = (sigma_s**2 - fresh**2).clamp(min=0).sqrt() / sigma_t
    return of_x, alpha_s - alpha_t * of_x, fresh


@dataclass(frozen=True)
class DDIMSolver(Solver):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z, tau the posterior deviation times eta.

    The posterior variance, of x_s given x_t and x0, in the form that holds for every schedule and not only
    for variance-preserving ones: sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).
    """

    noise: NoiseSchedule
    eta: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=1, stochastic=self.eta > 0)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        x0 = denoise(x, t)
        if self.eta == 0:
            return transfer(self.noise, x, x0, t, s), state
        return combine(weights(self.noise, t, s, self.eta), (x, x0, rng.normal_like(x))), state


@dataclass(frozen=True)
class DDIM(Plugin):
    """Song 2020, eq. 12 and 16, for any continuous noise schedule.

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM's posterior.
    """

    eta: float = 0.0

    summary = "DDIM, first order; eta from 0 (deterministic) to 1 (DDPM's ancestral step)"
    paper = "DDIM (2010.02502), eq. 12, 16"
    orders = "1"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"ddim: eta = {self.eta}: expected a number from 0 to 1")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"stochastic-step"}) if self.eta > 0 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DDIMSolver(noise, self.eta)
