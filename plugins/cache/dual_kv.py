"""Dual KV: as prefix KV, with keys and values kept also of the masks behind the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from suite.plugins.cache.prefix_kv import PrefixKV


@dataclass(frozen=True)
class DualKV(PrefixKV):
    """Wu 2025, section 3.2, "dual cache": between two blocks, the block alone is computed.

    What holds of `prefix-kv` holds here, and the masks behind the block keep the keys and values of the block's first
    evaluation too. Cheaper, and a little further from the plain answer.
    """

    summary = "masked tokens in blocks: compute the block alone, keep keys and values of all other places"
    paper = "Fast-dLLM (2505.22618), section 3.2, dual cache; refresh as in dLLM-Cache (2506.06295), section 3.2"
    suffix: ClassVar[bool] = True
    called: ClassVar[str] = "dual-kv"
