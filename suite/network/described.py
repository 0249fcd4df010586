"""A network in words, for messages. Torch is not needed for it, so plugins may import it at once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suite.network.facts import Network


def found(network: Network) -> str:
    """Class of the network and how many parts of each kind it has, for error messages."""
    counts = Counter(ref.kind for ref in network.blocks())
    parts = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no part of any known kind"
    return f"{type(network.module).__name__} has {parts}"
