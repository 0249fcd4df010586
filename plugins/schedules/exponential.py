"""The exponential grid: equal ratios of neighbouring noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.diffusion.schedule import Schedule
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules._levels import HIGH, Of, check_ends, grid, level, refuse_tokens, span

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


LOW = 0.02


@dataclass(frozen=True)
class ExponentialTimes(Schedule):
    """Levels in geometric progression from t = high to t = low; the first is moved to exactly 1, and 0 is added."""

    high: float
    low: float
    of: Of = "ratio"

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        most, least = (level(noise, t, self.of).log() for t in (self.high, self.low))
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        return grid(noise, torch.exp(most + ramp * (least - most)), self.of)


@dataclass(frozen=True)
class Exponential(Plugin):
    """NCSN's geometric ladder; diffusers' `use_exponential_sigmas`.

    In the ratio sigma / alpha it is the same as equal steps in log-SNR. In sigma it differs where alpha is not
    constant: for flow models it lays more steps near the data, for tokens near the last masks.

    Args:
        high, low: times between which the level falls; left out, the noise family's own, else 0.98 and 0.02.
        of: the level, `ratio` = sigma / alpha or `sigma`.
    """

    high: float | None = None
    low: float | None = None
    of: Of = "sigma"

    summary = "noise levels in geometric progression"
    paper = "NCSN (1907.05600), section 4.2"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        check_ends("exponential", LOW if self.low is None else self.low, HIGH if self.high is None else self.high)

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        refuse_tokens("exponential", noise, self.of)
        return ExponentialTimes(*span(noise, self.high, self.low, LOW), self.of)
