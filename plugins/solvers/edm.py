"""EDM's stochastic sampler: churn to a noisier time, then an Euler or Heun step of the probability flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from suite.diffusion.solver import Denoise, Solver, combine, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._stochastic import forward_weights
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.heun import HeunSolver

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.solver import SolverFacts
    from suite.run import Run

MOST = math.sqrt(2) - 1


@of_times
def churned(noise: NoiseSchedule, t: Tensor, gamma: Tensor | float, low: float, high: float) -> tuple[Tensor, ...]:
    """The time at which sigma / alpha is 1 + gamma times that at t, at most 1; t itself outside of [low, high]."""
    import torch

    log_snr = noise.log_snr(t)
    later = noise.time_at(log_snr - 2 * torch.log1p(torch.as_tensor(gamma, dtype=torch.float64)))
    return (later.clamp(max=1).maximum(t).where(log_snr.isfinite() & (t >= low) & (t <= high), t),)


@dataclass(frozen=True)
class EDMSolver(Solver):
    """From t to t_hat with sigma_hat / alpha_hat = (1 + gamma) sigma / alpha by fresh noise, then an ODE step to s.

    gamma = min(churn / steps, sqrt(2) - 1). Fresh noise is exact in law, so the order is that of the ODE step. Where
    `inflation` is not 1 it is that many times too large, and as a run adds as much noise however fine its grid is, the
    samples' variance keeps a bias: order 0. Nothing is added at alpha = 0.
    """

    noise: NoiseSchedule
    base: DDIMSolver | HeunSolver
    churn: float
    interval: tuple[float, float]
    inflation: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        exact = self.inflation == 1 or self.churn == 0
        return replace(
            self.base.facts, order=self.base.facts.order if exact else 0, stochastic=self.churn > 0, exact=exact
        )

    def init(self, run: Run) -> Any:
        return min(self.churn / run.steps, MOST)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        if self.churn > 0 and is_regular(self.noise, t):
            (value,) = churned(self.noise, t, state, *self.interval)
            later = t.new_tensor(value) if isinstance(value, int | float) else value
            keep, fresh = forward_weights(self.noise, t, later)
            x, t = combine((keep, fresh * self.inflation), (x, rng.normal_like(x))), later
        return self.base.step(denoise, x, t, s, state, rng)

    def evaluations(self, steps: int) -> int:
        """Those of the ODE solver."""
        return self.base.evaluations(steps)


@dataclass(frozen=True)
class EDM(Plugin):
    """Karras 2022, algorithm 2, for any continuous noise schedule.

    Args:
        order: 1 is Euler, 2 is Heun.
        churn: how much noise a whole run adds; 0 is deterministic, 40 and 80 are the paper's.
        low, high: times between which noise is added.
        inflation: factor of the added noise; the paper uses up to 1.007, against what a network removes too much.
            With an exact denoiser a bias stays.
    """

    order: int = 2
    churn: float = 0.0
    low: float = 0.0
    high: float = 1.0
    inflation: float = 1.0

    summary = "Euler (order 1) or Heun (order 2) of EDM with churn"
    paper = "EDM (2206.00364), algorithm 2"
    orders = "0-2"
    bench_options = ({"churn": 40.0},)  # without churn it is Heun
    acting_options: ClassVar[dict[str, Any]] = {"churn": 3.0}

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ConfigError(f"edm: order = {self.order}: expected 1 (Euler) or 2 (Heun)")
        if not self.churn >= 0:
            raise ConfigError(f"edm: churn = {self.churn}: expected a number of 0 or more")
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"edm: low = {self.low}, high = {self.high}: expected 0 <= low <= high <= 1")
        if not 0.5 <= self.inflation <= 2:
            raise ConfigError(f"edm: inflation = {self.inflation}: expected a number from 0.5 to 2")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        words = {
            "repeated-evaluations": self.order > 1,
            "stochastic-step": self.churn > 0,
            "time-jumps": self.churn > 0,
        }
        return frozenset(word for word, true in words.items() if true)

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        base = HeunSolver(noise) if self.order == 2 else DDIMSolver(noise, 0.0)
        return EDMSolver(noise, base, self.churn, (self.low, self.high), self.inflation)
