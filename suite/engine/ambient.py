"""What a process or thread has set for tensors of its own, put aside while the suite runs and left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Setting(Generic[T]):
    """A setting of the whole process. Engines in several threads may hold it at once: the last one puts it back."""

    def __init__(self, read: Callable[[], T], write: Callable[[T], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._inside = 0

    @contextmanager
    def held(self, value: T) -> Iterator[None]:
        """Hold it at `value`, the same for all who hold it."""
        with self._lock:
            if not self._inside:
                self._before = self._read()
                if self._before != value:
                    self._write(value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before != value:
                    self._write(self._before)


_DTYPE = Setting(torch.get_default_dtype, torch.set_default_dtype)


@contextmanager
def put_aside(device: str) -> Iterator[None]:
    """As in a fresh process: gradients where asked for, new tensors float32 on the CPU, no autocast.

    Number of threads, precision of products and `use_deterministic_algorithms` are the caller's, and stay in force.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted({"cpu", torch.device(device).type}):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_DTYPE.held(torch.float32))
        yield
