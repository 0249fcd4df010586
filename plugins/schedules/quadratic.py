"""The quadratic grid: equal steps in the square root of time."""

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
class PowerTimes(Schedule):
    """t_i = (1 - i/n)^power."""

    power: float = 2.0

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        return above_end(noise, torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** self.power)


@dataclass(frozen=True)
class Quadratic(Plugin):
    """DDIM's quadratic sub-sequence, tau_i = c i^2.

    Works for tokens as for real vectors: it is a statement about t alone.

    Args:
        power: 2 in the paper; 1 is `uniform`, more puts more steps near the data.
    """

    power: float = 2.0

    summary = "equal steps in sqrt(t), or in another root of it"
    paper = "DDIM (2010.02502), appendix D.2"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not 0.1 <= self.power <= 10:
            raise ConfigError(f"quadratic: power = {self.power}: expected a number from 0.1 to 10; 1 is uniform")

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del noise, run
        return PowerTimes(self.power)
