"""Karras' grid: equal steps in the noise level to the power 1 / rho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.diffusion.schedule import Schedule
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules._levels import HIGH, Of, check_ends, grid, level, refuse_tokens, span

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


LOW = 0.01


@dataclass(frozen=True)
class KarrasTimes(Schedule):
    """EDM eq. 5 on the noise level; the first stop is moved to exactly 1, and 0 is added."""

    rho: float
    high: float
    low: float
    of: Of = "ratio"

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        most, least = (float(level(noise, t, self.of)) for t in (self.high, self.low))
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        root = most ** (1 / self.rho) + ramp * (least ** (1 / self.rho) - most ** (1 / self.rho))
        return grid(noise, root**self.rho, self.of)


@dataclass(frozen=True)
class Karras(Plugin):
    """The grid of EDM.

    Args:
        rho: 7 in the paper; larger values put more steps near the data.
        high, low: times between which the level is spread; outside of them it is infinite or zero. Left out, the
            noise family's own (`ve`: from sigma_max to sigma_min), else 0.98 and 0.01.
        of: the level, `ratio` = sigma / alpha as in the paper, or `sigma`, as diffusers has it for flow models.
    """

    rho: float = 7.0
    high: float | None = None
    low: float | None = None
    of: Of = "ratio"

    summary = "EDM's grid: equal steps in (sigma/alpha)^(1/rho)"
    paper = "EDM (2206.00364), eq. 5"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not 1 <= self.rho <= 100:
            raise ConfigError(f"karras: rho = {self.rho}: expected a number from 1 to 100")
        check_ends("karras", LOW if self.low is None else self.low, HIGH if self.high is None else self.high)

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        refuse_tokens("karras", noise, self.of)
        return KarrasTimes(self.rho, *span(noise, self.high, self.low, LOW), self.of)
