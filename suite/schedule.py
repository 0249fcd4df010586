"""`Schedule`: where the sampler stops, and when training looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from suite.errors import ConfigError

if TYPE_CHECKING:  # a plugin's module must load without torch, so that listing it is cheap
    import torch
    from torch import Tensor

    from suite.noise import NoiseSchedule


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

        return 1 - torch.rand(batch, generator=rng, dtype=torch.float64)


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


def with_exact_ends(inner: Tensor) -> Tensor:
    """Interior stops with exact 1 in front and exact 0 behind: log-SNR may be infinite there, times are not."""
    import torch

    return torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])
