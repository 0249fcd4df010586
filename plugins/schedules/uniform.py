"""Uniform times: the grid of DDIM and of flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.diffusion.schedule import Schedule, above_end
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


@dataclass(frozen=True)
class UniformTimes(Schedule):
    """t_i = f(1 - i/n), f the flow shift u -> shift u / (1 + (shift - 1) u), which keeps 0 and 1."""

    shift: float = 1.0

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return above_end(noise, u if self.shift == 1 else self.shift * u / (1 + (self.shift - 1) * u))


@dataclass(frozen=True)
class Uniform(Plugin):
    """Equal steps in t.

    Args:
        shift: resolution shift of SD3 (Esser 2024, eq. 23); above 1 spends more steps near the prior.
    """

    shift: float = 1.0

    summary = "equal steps in time, with SD3's resolution shift"
    paper = "DDIM (2010.02502); shift: SD3 (2403.03206), eq. 23"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not 0 < self.shift <= 100:
            raise ConfigError(f"uniform: shift = {self.shift}: expected a number in (0, 100]; 1 changes nothing")

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del noise, run
        return UniformTimes(self.shift)
