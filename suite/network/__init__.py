"""Networks: their facts, their parts, and how plugins act inside of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.network.facts import BlockRef as BlockRef
    from suite.network.facts import Layout as Layout
    from suite.network.facts import Network as Network

_FACTS = ("BlockRef", "Layout", "Network")


def __getattr__(name: str) -> Any:
    # Loaded on first use: modules of this room that need no torch must not bring it.
    if name in _FACTS:
        from suite.network import facts

        return getattr(facts, name)
    raise AttributeError(f"module 'suite.network' has no attribute {name!r}")
