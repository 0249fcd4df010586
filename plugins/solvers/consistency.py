"""Consistency sampling: jump to the data, put noise of the next time on, jump again. Also sCM's sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def renoise_weights(noise: NoiseSchedule, s: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Weights of the data, which hold noise of sigma / alpha = `floor`, and of fresh noise in x_s."""
    return noise.alpha(s), (noise.sigma(s) ** 2 - (floor * noise.alpha(s)) ** 2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class ConsistencySolver(Solver):
    """x_s = alpha_s f(x, t) + sqrt(sigma_s^2 - floor^2 alpha_s^2) z, f the network's x0.

    A consistency network's x0 is the end of the probability flow through (x, t), and then each step samples the
    data's own law; the mean of x0, which other networks give, is not, and more steps do not mend that: order 0.
    """

    noise: NoiseSchedule
    floor: float
    facts = SolverFacts(order=0, stochastic=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        return combine(renoise_weights(self.noise, s, self.floor), (denoise(x, t), rng.normal_like(x))), state


@dataclass(frozen=True)
class Consistency(Plugin):
    """Song 2023, algorithm 1; with TrigFlow's noise it is the sampler of sCM (Lu & Song 2024, 2410.11081).

    Args:
        floor: sigma / alpha at which the network's answers lie: 0, or the least noise that it was trained with.
    """

    floor: float = 0.0

    summary = "multistep consistency sampling (CM, iCT, sCM), for networks that jump to the end of the flow"
    paper = "consistency models (2303.01469), algorithm 1; sCM (2410.11081), eq. 8"
    orders = "0"
    effects = frozenset({"stochastic-step"})

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ConfigError(f"consistency: floor = {self.floor}: expected a number from 0, below 1")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return ConsistencySolver(noise, self.floor)
