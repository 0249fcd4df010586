"""Replace the forwards of modules for a while, and put them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Patches:
    """Forwards replaced by one wrap. Nested wraps undo newest first, as the engine does.

    The module itself stays in its place, with its weights, dtype, config and hooks: callers that read
    those keep working, which replacing the module would break.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, Forward | None]] = []

    def replace(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        """Call `make(current forward)` and install what it returns.

        Raises:
            ValueError: this wrap has replaced the module's forward before: a wrap was applied twice.
        """
        if any(module is seen for seen, _ in self._undo):
            raise ValueError(f"the forward of this {type(module).__name__} was replaced before by the same wrap")
        previous = module.__dict__.get("forward")
        replacement = make(module.forward)
        self._undo.append((module, previous))
        module.forward = replacement

    def undo(self) -> None:
        """Restore what was there before the first `replace`."""
        while self._undo:
            module, previous = self._undo.pop()
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.forward = previous
