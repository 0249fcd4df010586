"""One generator a sample: a result depends on its own seed and on nothing else in the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from suite.engine.ambient import Setting


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Gradients on a CPU are summed in one order, so that the same seed gives the same bits.

    Without it the backward of `values[index]` with repeated indices adds by atomics from every thread: on two threads
    29 of 30 gradients of a mesh's colours differed in their last bits. On a GPU nothing changes, as several
    operations (grid_sample's backward in three dimensions) have no ordered form there and would be refused.
    """
    if device.type != "cpu":
        yield
        return
    with _ORDERED.held((True, False, False)):
        yield


def _order() -> tuple[bool, bool, bool]:
    memory: Any = torch.utils.deterministic  # a module whose one setting its class makes
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, memory.fill_uninitialized_memory


def _set_order(order: tuple[bool, bool, bool]) -> None:
    memory: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(order[0], warn_only=order[1])
    memory.fill_uninitialized_memory = order[2]


#: Deterministic, not only warned about; uninitialised memory is not filled, which costs time and is never read here.
_ORDERED = Setting(_order, _set_order)


def generator(seed: int, stream: str = "sample") -> torch.Generator:
    """The random numbers of a seed, on the CPU; each `stream` (at most 16 letters) has numbers of its own.

    PyTorch's generator takes the low 32 bits of its seed only, and begins from them as they are. So the seed is hashed
    first: seeds 2^32 apart differ, none is special, and streams of one seed have nothing in common.
    """
    mixed = hashlib.blake2b(str(seed).encode(), digest_size=8, person=stream.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


class SampleRng:
    """Independent streams, one a row of the batch; drawn on the CPU so that every device gets the same numbers."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._generators = [generator(seed) for seed in self.seeds]

    @property
    def generators(self) -> list[torch.Generator]:
        """The streams themselves, for libraries that draw on their own."""
        return self._generators

    def of(self, rows: Sequence[int]) -> SampleRng:
        """The streams of some rows: the same ones, not copies, so what is drawn from them is drawn here."""
        out = SampleRng(())
        out.seeds = tuple(self.seeds[row] for row in rows)
        out._generators = [self._generators[row] for row in rows]
        return out

    @staticmethod
    def joined(parts: Sequence[SampleRng]) -> SampleRng:
        """The streams of several, one after the other: the same ones, not copies."""
        out = SampleRng(())
        out.seeds = tuple(seed for part in parts for seed in part.seeds)
        out._generators = [g for part in parts for g in part._generators]
        return out

    def normal(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """Standard normal [len(seeds), *shape], float32, on `like`'s device and in its dtype."""
        if len(self._generators) == 1:
            out = torch.randn((1, *shape), generator=self._generators[0])
        else:
            # Each row is drawn where it stays: the same numbers as drawn apart and stacked, without the copy.
            out = torch.empty(len(self._generators), *shape)
            for row, generator in zip(out, self._generators, strict=True):
                torch.randn(tuple(shape), generator=generator, out=row)
        return out if like is None else out.to(like)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal of x's shape, whose first axis is the batch."""
        return self.normal(x.shape[1:], like=x)

    def uniform(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """Uniform on [0, 1), [len(seeds), *shape]."""
        out = torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators])
        return out if like is None else out.to(like)
