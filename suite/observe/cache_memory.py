"""What the caches of a run may hold together, and what they held."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser

MIB = 2**20
SHARE = 0.5
"""Of the device's memory, where no limit is named."""


def device_memory(device: str) -> int:
    """Bytes of memory that the device has."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class CacheMemory:
    """The bytes of all caches of one run, looked at after every evaluation of the network.

    Attributes:
        held: of each cache by name, what it keeps at present; see `suite.wrap.Wrap.held`.
        limit: most bytes of all together.
        peak: the most that was seen.
    """

    held: Mapping[str, Callable[[], int]]
    limit: int
    peak: int = 0

    @staticmethod
    def of(caches: Mapping[str, Wrap | None], limit_mib: float | None, device: str) -> CacheMemory:
        """For the caches of a run; without a limit, half of the device's memory is one."""
        limit = int(SHARE * device_memory(device)) if limit_mib is None else int(limit_mib * MIB)
        return CacheMemory({name: w.held for name, w in caches.items() if w and w.held}, limit)

    def wraps(self) -> list[Wrap]:
        """What looks, around all other denoisers; nothing without a cache that holds something."""
        if not self.held:
            return []
        return [Wrap(report=lambda: WrapReport(0, "", reason="it looks"), denoiser=lambda inner: _Looking(inner, self))]

    def look(self) -> None:
        """Take note of what is held.

        Raises:
            ConfigError: it is more than the limit.
        """
        total = sum(held() for held in self.held.values())
        if total > self.peak:
            self.peak = total
        if total <= self.limit:
            return
        each = ", ".join(f"{name} {held() / MIB:.4g} MiB" for name, held in self.held.items())
        raise ConfigError(
            f"caches hold {total / MIB:.4g} MiB ({each}), more than the limit of {self.limit / MIB:.4g} MiB; make "
            "smaller batches (--batch), take a cache or a setting that keeps less, or raise --cache-limit"
        )

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {"limit": self.limit, "peak": self.peak} if self.held else {}


@dataclass(frozen=True)
class _Looking:
    """A Denoiser around another one."""

    inner: Denoiser
    memory: CacheMemory

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        out = self.inner.denoise(x, t, cond, call)
        self.memory.look()
        return out
