"""`Schedule`: where the sampler stops, and when training looks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from suite.errors import ConfigError

if TYPE_CHECKING:  # a plugin's module must load without torch, so that listing it is cheap
    import torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule


GRID = 64
"""Steps of the grid that distillation follows."""
WINDOW = 0.2
"""Width of the window of the grid from which distillation draws."""
DISTILLATION_PART = (0.25, 0.7)
"""The part of the grid that distillation follows: before it a teacher says nothing, after it nothing new."""
DISTILLATION_RANGE = (0.02, 0.98)
"""DreamFusion's range of times."""


class Schedule(ABC):
    """What the `schedule` hook returns. It sees no network.

    Attributes:
        noise: a noise schedule to use instead of the checkpoint's, or None.
    """

    noise: NoiseSchedule | None = None

    @abstractmethod
    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        """[steps + 1] (or [steps + 1, groups]) float64 times, decreasing from 1 to 0."""

    def training_times(self, batch: int, rng: torch.Generator) -> Tensor:
        """[batch] times for training or distillation; uniform on (0, 1] unless a schedule knows better."""
        import torch

        return 1 - torch.rand(batch, generator=rng, dtype=torch.float64, device=rng.device)

    def distillation_times(self, noise: NoiseSchedule, batch: int, progress: float, rng: torch.Generator) -> Tensor:
        """[batch] times for score distillation at `progress` in [0, 1] of a run, in (0, 1].

        By default they go down this schedule's own grid, as sampling would, each drawn from a window around its
        place: large times first settle the shape, small ones the detail (DreamTime, 2306.12422, section 4). The
        place is linear in the square root of progress (HiFA, 2305.18766, section 4.1).
        """
        import torch

        grid = self.timesteps(noise, GRID)
        grid = grid.reshape(grid.shape[0], -1)[:, 0]
        first, last = DISTILLATION_PART
        jitter = WINDOW * (torch.rand(batch, generator=rng, dtype=torch.float64) - 0.5)
        place = (first + (last - first) * math.sqrt(progress) + jitter).clamp(0, 1) * GRID
        left = place.floor().long().clamp(max=GRID - 1)
        times = grid[left] + (place - left) * (grid[left + 1] - grid[left])
        return times.clamp(*DISTILLATION_RANGE)


def check_timesteps(times: Tensor, steps: int) -> None:
    """Refuse a grid that no solver can use.

    Raises:
        ConfigError: wrong length, outside [0, 1], not decreasing from 1 to 0.
    """
    if times.shape[0] != steps + 1:
        raise ConfigError(f"the schedule gave {times.shape[0]} times for {steps} steps; expected {steps + 1}")
    if not times.isfinite().all() or times.min() < 0 or times.max() > 1:
        raise ConfigError(f"the schedule gave times outside [0, 1]: {times.flatten().tolist()[:8]}")
    columns = times.reshape(times.shape[0], -1)
    if (columns[1:] > columns[:-1]).any() or not (columns[1:] < columns[:-1]).any(dim=1).all():
        raise ConfigError(f"the schedule's times do not decrease: {times.flatten().tolist()[:8]}")
    if (columns[0] != 1).any() or (columns[-1] != 0).any():
        raise ConfigError(f"the schedule must run from 1 to 0; got {columns[0, 0]} to {columns[-1, 0]}")


def above_end(noise: NoiseSchedule, times: Tensor) -> Tensor:
    """A grid [steps + 1] in t whose last stop before 0 is not below the last that the noise family wants.

    Stretched from t = 1; as it was where the family wants none, or where the grid does not go so low.
    """
    if noise.ends is None or len(times) < 3 or float(times[-2]) >= noise.ends[1]:
        return times
    out = 1 - (1 - times) * (1 - noise.ends[1]) / (1 - times[-2])
    out[-1] = 0
    return out


def with_exact_ends(inner: Tensor) -> Tensor:
    """Interior stops with exact 1 in front and exact 0 behind: log-SNR may be infinite there, times are not."""
    import torch

    return torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])
