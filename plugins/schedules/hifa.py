"""HiFA's annealing: distillation times fall with the square root of progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.diffusion.schedule import Schedule
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules._levels import check_ends
from suite.plugins.schedules.uniform import UniformTimes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


@dataclass(frozen=True)
class AnnealedTimes(Schedule):
    """t = high - (high - low) progress^power to distill, the same for the whole batch; even times to sample."""

    high: float
    low: float
    power: float

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        return UniformTimes().timesteps(noise, steps)

    def distillation_times(self, noise: NoiseSchedule, batch: int, progress: float, rng: torch.Generator) -> Tensor:
        import torch

        del noise, rng
        time = self.high - (self.high - self.low) * min(1.0, max(0.0, progress)) ** self.power
        return torch.full((batch,), time, dtype=torch.float64)


@dataclass(frozen=True)
class HiFA(Plugin):
    """Zhu 2023: large times briefly for the shape, small ones long for the detail, without chance.

    The default of every schedule follows its own grid instead, by the same law and within a window; this is the
    paper's own rule, in t.

    Args:
        high, low: first and last time of a distillation.
        power: 0.5 in the paper; 1 falls evenly.
    """

    high: float = 0.98
    low: float = 0.02
    power: float = 0.5

    summary = "distillation times that fall with the square root of progress"
    paper = "HiFA (2305.18766), section 4.1"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        check_ends("hifa", self.low, self.high)
        if not 0.1 <= self.power <= 10:
            raise ConfigError(f"hifa: power = {self.power}: expected a number from 0.1 to 10")

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del noise, run
        return AnnealedTimes(self.high, self.low, self.power)
