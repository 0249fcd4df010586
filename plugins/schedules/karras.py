"""Karras' grid: equal steps in (sigma/alpha)^(1/rho)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.schedule import Schedule, with_exact_ends

if TYPE_CHECKING:
    from torch import Tensor

    from suite.noise import NoiseSchedule
    from suite.run import Run


@dataclass(frozen=True)
class KarrasTimes(Schedule):
    """EDM eq. 5 on the noise-to-signal ratio; the first stop is moved to exactly 1, and 0 is added."""

    rho: float
    high: float
    low: float

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        most, least = (math.exp(-float(noise.log_snr(t)) / 2) for t in (self.high, self.low))
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)[1:]
        ratio = (most ** (1 / self.rho) + ramp * (least ** (1 / self.rho) - most ** (1 / self.rho))) ** self.rho
        return with_exact_ends(noise.time_at(-2 * ratio.log()))


@dataclass(frozen=True)
class Karras(Plugin):
    """The grid of EDM.

    Args:
        rho: 7 in the paper; larger values put more steps near the data.
        high, low: times between which the ratio is spread; outside of them it is infinite or zero.
    """

    rho: float = 7.0
    high: float = 0.98
    low: float = 0.01

    summary = "EDM's grid: equal steps in (sigma/alpha)^(1/rho)"
    paper = "EDM (2206.00364), eq. 5"
    lossless = True
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not 1 <= self.rho <= 100:
            raise ConfigError(f"karras: rho = {self.rho}: expected a number from 1 to 100")
        if not 0 < self.low < self.high < 1:
            raise ConfigError(f"karras: low = {self.low}, high = {self.high}: expected 0 < low < high < 1")

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        if noise.discrete:
            raise ConfigError("karras needs real-valued noise; a token model has no sigma: use --schedule uniform")
        return KarrasTimes(self.rho, self.high, self.low)
