"""LCM: consistency sampling with the boundary scalings that latent consistency models are trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers.consistency import renoise_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

SIGMA_DATA = 0.5


@of_times
def boundary_weights(noise: NoiseSchedule, t: Tensor, scaling: Tensor | float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at t, the weights of x and of the network's x0; u counts a thousand timesteps."""
    del noise
    u = 1000 * t * scaling
    spread = u**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / spread, u / spread.sqrt()


@of_times
def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, scaling: Tensor | float) -> tuple[Tensor, ...]:
    """Weights of x, the network's x0 and fresh noise in x_s."""
    import torch

    skip, out = (torch.as_tensor(w, dtype=torch.float64) for w in boundary_weights(noise, t, scaling))
    alpha, fresh = (torch.as_tensor(w, dtype=torch.float64) for w in renoise_weights(noise, s, 0.0))
    return alpha * skip, alpha * out, fresh


@dataclass(frozen=True)
class LCMSolver(Solver):
    """x_s = alpha_s f + sigma_s z with f = c_skip x + c_out x0, which is x itself at t = 0."""

    noise: NoiseSchedule
    scaling: float
    facts = SolverFacts(order=0, stochastic=True, exact=False)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        return combine(weights(self.noise, t, s, self.scaling), (x, denoise(x, t), rng.normal_like(x))), state


@dataclass(frozen=True)
class LCM(Plugin):
    """Luo 2023, algorithm 3. Guidance is inside such networks: sample with --guidance 1.

    Args:
        scaling: of the time in the boundary scalings; 10 in all published models.
    """

    scaling: float = 10.0

    summary = "LCM: consistency sampling with boundary scalings, for 1 to 8 steps"
    paper = "LCM (2310.04378), algorithm 3, eq. 9"
    orders = "0"
    effects = frozenset({"stochastic-step"})

    def __post_init__(self) -> None:
        if not 0 < self.scaling <= 1000:
            raise ConfigError(f"lcm: scaling = {self.scaling}: expected a number above 0, up to 1000")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return LCMSolver(noise, self.scaling)
