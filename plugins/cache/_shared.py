"""What the caches of block outputs have in common: counting bytes, and saying what a network is made of."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.network import Network


def size(value: Any) -> int:
    """Bytes of the tensors in an output: a tensor, None, or a tuple or list of outputs."""
    if isinstance(value, tuple | list):
        return sum(size(v) for v in value)
    return 0 if value is None else value.numel() * value.element_size()


def found(network: Network) -> str:
    """Class of the network and how many parts of each kind it has, for error messages."""
    counts = Counter(ref.kind for ref in network.blocks())
    parts = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no part of any known kind"
    return f"{type(network.module).__name__} has {parts}"
