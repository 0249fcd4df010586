"""Encoded requests that an engine remembers, so that the same request is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from suite.diffusion.denoiser import Cond
from suite.request import Request

Encoded = Mapping[str, Cond]

LIMIT = 32 * 2**20
"""Bytes of encoded requests that are kept; the newest one always is."""


@dataclass
class Encodings:
    """What an engine has encoded.

    Whole requests are remembered, not prompts: an encoder rounds a prompt differently in another batch, and a result
    must not depend on what was asked before.
    """

    kept: dict[Any, Encoded] = field(default_factory=dict)

    def of(self, request: Request, encode: Callable[[Request], Encoded]) -> tuple[Encoded, bool]:
        """The request's conditioning, and whether an equal request had it already."""
        init = request.init.sha256 if request.init else ""
        key = (request.prompts, request.negative, tuple(sorted(request.options.items())), init)
        reused = key in self.kept
        cond = self.kept.pop(key) if reused else encode(request)
        self.kept[key] = cond  # the newest last
        while len(self.kept) > 1 and self.bytes > LIMIT:
            del self.kept[next(iter(self.kept))]
        return cond, reused

    @property
    def bytes(self) -> int:
        """What is kept."""
        values = [v for conds in self.kept.values() for cond in conds.values() for v in cond.values()]
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
