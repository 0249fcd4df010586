"""Equal steps in log-SNR: the grid on which exponential integrators have their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.diffusion.schedule import Schedule, with_exact_ends
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules._levels import HIGH, check_ends, span

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


LOW = 0.02


@dataclass(frozen=True)
class LogSNRTimes(Schedule):
    """log-SNR linear from t = high to t = low; the first stop is moved to exactly 1, and 0 is added."""

    high: float
    low: float

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        first, last = (float(noise.log_snr(t)) for t in (self.high, self.low))
        inner = noise.time_at(torch.linspace(first, last, steps, dtype=torch.float64)[1:])
        return with_exact_ends(inner)


@dataclass(frozen=True)
class LogSNR(Plugin):
    """Equal steps in log(alpha^2 / sigma^2).

    Args:
        high: time near the prior from which log-SNR is counted (it is -inf at 1 for some schedules).
        low: last time before 0, where log-SNR is +inf. Left out, both are the noise family's own (`ve`: from
            sigma_max to sigma_min), else 0.98 and 0.02.
    """

    high: float | None = None
    low: float | None = None

    summary = "equal steps in log-SNR"
    paper = "DPM-Solver (2206.00927), section 3.4"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        check_ends("log-snr", LOW if self.low is None else self.low, HIGH if self.high is None else self.high)

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        if noise.discrete:
            raise ConfigError("log-snr needs real-valued noise; a token model has no log-SNR: use --schedule uniform")
        return LogSNRTimes(*span(noise, self.high, self.low, LOW))
