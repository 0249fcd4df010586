"""TCD: jump along the flow beyond the next time, and put noise on to come back to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer_weights
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._stochastic import forward_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, beyond: Tensor) -> tuple[Tensor, ...]:
    """Weights of x, x0 and noise: DDIM's transfer from t to `beyond` <= s, then the forward process up to s."""
    import torch

    of_x, of_x0 = (torch.as_tensor(w, dtype=torch.float64) for w in transfer_weights(noise, t, beyond))
    keep, fresh = (torch.as_tensor(w, dtype=torch.float64) for w in forward_weights(noise, beyond, s))
    return keep * of_x, keep * of_x0, fresh


@dataclass(frozen=True)
class TCDSolver(Solver):
    """Strategic stochastic sampling: to (1 - gamma) s along the flow, and by noise up to s.

    gamma = 0 is DDIM, gamma = 1 consistency sampling. In between the jump beyond s is never small, so the order is 0
    unless the network gives the flow itself.
    """

    noise: NoiseSchedule
    gamma: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=0 if self.gamma else 1, stochastic=self.gamma > 0)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        x0 = denoise(x, t)
        if self.gamma == 0:
            return combine(transfer_weights(self.noise, t, s), (x, x0)), state
        return combine(weights(self.noise, t, s, (1 - self.gamma) * s), (x, x0, rng.normal_like(x))), state


@dataclass(frozen=True)
class TCD(Plugin):
    """Zheng 2024, algorithm 1.

    Args:
        gamma: 0 is deterministic, 1 is consistency sampling; 0.2 to 0.3 in the paper.
    """

    gamma: float = 0.3

    summary = "TCD: strategic stochastic sampling, for 1 to 20 steps of trajectory consistency networks"
    paper = "TCD (2402.19159), algorithm 1"
    orders = "0-1"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"tcd: gamma = {self.gamma}: expected a number from 0 to 1")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"stochastic-step"}) if self.gamma else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return TCDSolver(noise, self.gamma)
