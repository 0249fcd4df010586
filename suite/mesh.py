"""`Mesh`: ranks and collectives as plugins see them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from suite.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """This process among its peers. Size 1 needs no process group."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Mesh:
        """Join the process group that torchrun or accelerate launch described, once; else a mesh of one.

        NCCL on GPUs, gloo on a CPU.
        """
        if not dist.is_available() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return Mesh()
        if not dist.is_initialized():
            gpu = torch.cuda.is_available()
            if gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            try:
                dist.init_process_group("nccl" if gpu else "gloo")
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"RANK and WORLD_SIZE are set but no process group could be joined: {error}"
                ) from error
        return Mesh(dist.get_rank(), dist.get_world_size())

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in rank order; equal shapes. Costs size * x bytes received."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    @staticmethod
    def leave() -> None:
        """Leave the process group, if one was joined."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
