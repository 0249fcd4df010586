"""`Mesh`: ranks and collectives as plugins see them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from suite.errors import ConfigError, RankError

TIMEOUT = 60.0
"""Seconds that a rank waits for another one by default."""
VARIABLE = "SUITE_RANK_TIMEOUT"
"""Environment variable with another number of seconds."""


@dataclass(frozen=True)
class Mesh:
    """This process among its peers. Size 1 needs no process group.

    Attributes:
        timeout: seconds that a collective waits for the other ranks.
    """

    rank: int = 0
    size: int = 1
    timeout: float = TIMEOUT

    @staticmethod
    def current(timeout: float | None = None) -> Mesh:
        """Join the process group that torchrun or accelerate launch described, once; else a mesh of one.

        NCCL on GPUs, gloo on a CPU.

        Args:
            timeout: seconds to wait for another rank; by default those of SUITE_RANK_TIMEOUT, else 60. A group that
                was joined before keeps the one that it has.

        Raises:
            ConfigError: a timeout that is none, or no group could be joined.
        """
        seconds = seconds_of(timeout)
        if not dist.is_available() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return Mesh()
        if not dist.is_initialized():
            gpu = torch.cuda.is_available()
            if gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
                # Else a rank that waits in vain is ended by NCCL's watchdog, without a word of ours.
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            try:
                dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=seconds))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"RANK = {os.environ['RANK']} and WORLD_SIZE = {os.environ['WORLD_SIZE']} are set, but no process "
                    f"group could be joined within {seconds:g} s: {str(error)[:500]}; start all ranks, or unset both"
                ) from error
        return Mesh(dist.get_rank(), dist.get_world_size(), seconds)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in rank order; equal shapes. Costs size * x bytes received."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._answered():
            dist.all_gather(parts, x.contiguous())
        return parts

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with self._answered():
                dist.barrier()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """A collective; that another rank does not take part in it is told in words."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if "timed out" in text or "timeout" in text:
                what = f"no answer for {self.timeout:g} s; {VARIABLE}=SECONDS lets slow ranks take longer"
            elif any(word in text for word in ("connection", "socket", "broken pipe", "peer")):
                what = "its connection is closed; what it wrote last says why"
            else:
                raise
            others = [str(rank) for rank in range(self.size) if rank != self.rank]
            who = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {', '.join(others)}"
            raise RankError(f"{who} is gone ({what})") from error

    @staticmethod
    def leave() -> None:
        """Leave the process group, if one was joined."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def seconds_of(timeout: float | None = None) -> float:
    """How long to wait for another rank: as given, or as the environment says, or 60 s.

    Raises:
        ConfigError: not a number above 0 and at most a day.
    """
    given = os.environ.get(VARIABLE) if timeout is None else timeout
    if given is None:
        return TIMEOUT
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= 86400:
        what = VARIABLE if timeout is None else "rank timeout"
        raise ConfigError(f"{what} = {str(given)[:80]!r}: expected seconds above 0 and at most 86400, e.g. 60")
    return seconds
