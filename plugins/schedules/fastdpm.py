"""FastDPM: a short diffusion process inside a long one, by its variances or by its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suite.diffusion.schedule import Schedule, above_end
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run

Spacing = Literal["linear", "quadratic"]
BISECTIONS = 200


def variances(count: int, first: float, log_bar: float, spacing: Spacing) -> Tensor:
    """[count] variances eta of a process that keeps prod(1 - eta) = exp(log_bar) of the signal (VAR).

    They begin at `first`. linear: eta_s in even steps; quadratic: eta_s = first (1 + s c)^2. The free number is
    found by bisection, to the last bit. One step alone is 1 - exp(log_bar).

    Raises:
        ConfigError: `first` taken `count` times already destroys more.
    """
    import torch

    if count == 1:
        return -torch.expm1(torch.tensor([log_bar], dtype=torch.float64))
    if count * math.log1p(-first) < log_bar:
        raise ConfigError(
            f"fastdpm: {count} steps of the smallest variance {first:g} already destroy more than the whole process "
            "does: take fewer steps, or method=step"
        )
    index = torch.arange(count, dtype=torch.float64)

    def etas(last: float) -> Tensor:
        if spacing == "linear":
            return first + (last - first) * index / (count - 1)
        slope = (math.sqrt(last / first) - 1) / (count - 1)
        return first * (1 + index * slope) ** 2

    low, high = first, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if float(torch.log1p(-etas(middle)).sum()) > log_bar else (low, middle)
    return etas(low)


@dataclass(frozen=True)
class FastDPMTimes(Schedule):
    """Levels of the short process, each at the real-valued time at which the long one has it.

    Attributes:
        method: `var` or `step`.
        spacing: of the variances or of the steps.
        first: smallest variance of `var`.
        high: where the prior counts as reached; 1 where the model keeps some signal there.
        trained: steps of the long process.
        noise: DDPM's table at real-valued steps in place of a linear table, else None.
    """

    method: Literal["var", "step"]
    spacing: Spacing
    first: float
    high: float
    trained: int
    noise: NoiseSchedule | None = None

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        inner = self._steps(steps) if self.method == "step" else self._levels(noise, steps)
        return above_end(noise, torch.cat([inner.new_ones(1), inner[1:], inner.new_zeros(1)]))

    def _steps(self, steps: int) -> Tensor:
        import torch

        root = 1.0 if self.spacing == "linear" else 2.0
        ends = (1.0, self.trained ** (-1 / root))
        return torch.linspace(*ends, steps, dtype=torch.float64) ** root

    def _levels(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        def log_bar(log_snr: Tensor) -> Tensor:
            # alpha^2 / (alpha^2 + sigma^2): what a variance-preserving process of the same log-SNR keeps.
            return torch.nn.functional.logsigmoid(log_snr)

        begin = float(log_bar(noise.log_snr(0.0)))  # not 0 where the data are noisy from the first
        etas = variances(steps, self.first, float(log_bar(noise.log_snr(self.high))) - begin, self.spacing)
        kept = begin + torch.log1p(-etas).cumsum(0).flip(0)
        # log-SNR = log(bar / (1 - bar)); expm1 keeps its digits where bar is near 1.
        return noise.time_at(kept - torch.log(-torch.expm1(kept)))


@dataclass(frozen=True)
class FastDPM(Plugin):
    """Kong & Ping 2021: S steps instead of T, through the bijection between noise levels and real-valued steps.

    For a checkpoint with DDPM's linear table the noise level at real-valued steps is that of the paper, with Gamma
    functions, and goes to the solver with the times. Other noise schedules are continuous by themselves. The
    paper's kappa is DDIM's eta: `--solver ddim:eta=1` is kappa = 1, advised for speech, `--solver ddim` kappa = 0.

    Args:
        method: `var` chooses the variances of the short process, `step` its steps.
        spacing: linear or quadratic, of what is chosen.
        first: smallest variance of `var`, for a noise schedule that has no table of its own.
        high: where the prior counts as reached, for a noise schedule without signal at t = 1.
        trained: steps of the long process, for a noise schedule that has no table; `step` ends at 1 / trained.
    """

    method: Literal["var", "step"] = "var"
    spacing: Spacing = "linear"
    first: float = 1e-4
    high: float = 0.99
    trained: int = 1000

    summary = "a short process inside the trained one, by variances (VAR) or steps (STEP)"
    paper = "FastDPM (2106.00132), section 3"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not 0 < self.first <= 0.01:
            raise ConfigError(f"fastdpm: first = {self.first}: expected a variance in (0, 0.01]")
        if not 0.5 <= self.high < 1:
            raise ConfigError(f"fastdpm: high = {self.high}: expected a time from 0.5 to below 1")
        if not 10 <= self.trained <= 1_000_000:
            raise ConfigError(f"fastdpm: trained = {self.trained}: expected 10 to 1000000 steps")

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        if noise.discrete:
            raise ConfigError("fastdpm chooses variances of Gaussian noise; a token model has none: use uniform")
        betas = getattr(noise, "betas", None)
        trained = len(betas) if betas else self.trained
        first = betas[0] if betas else self.first
        high = 1.0 if bool(noise.log_snr(1.0).isfinite()) else self.high
        return FastDPMTimes(self.method, self.spacing, first, high, trained, _real_valued(noise))


def _real_valued(noise: NoiseSchedule) -> NoiseSchedule | None:
    """DDPM's linear table at real-valued steps, if `noise` is such a table, else None."""
    from suite.diffusion.noise import VPGamma, VPTable

    if not isinstance(noise, VPTable) or len(noise.betas) < 2:
        return None
    first, last, count = noise.betas[0], noise.betas[-1], len(noise.betas)
    step = (last - first) / (count - 1)
    # Tables of checkpoints are float32: the last digits of a line.
    straight = all(abs(beta - first - k * step) <= 1e-3 * step for k, beta in enumerate(noise.betas))
    return VPGamma(count, first, last) if step > 0 and straight else None
