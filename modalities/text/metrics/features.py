"""MiniLM sentence vectors, the features of every comparison of meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LENGTH = 64
"""Tokens of a text at most."""


def features(texts: Sequence[str], batch: int = 256) -> Tensor:
    """[N, 384] of length 1: the mean of the token states of each text."""
    from suite.modalities.shared.text_encoder import WIDTH, encode

    rows = []
    # Alike lengths together: a batch is padded to its longest.
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    for start in range(0, len(order), batch):
        chosen = [texts[k] for k in order[start : start + batch]]
        room = min(LENGTH, 4 + max(len(t.split()) for t in chosen) * 2)
        found = encode(chosen, room)
        rows.append(found.states.sum(1) / found.mask.sum(1, keepdim=True))
    if not rows:
        return torch.zeros(0, WIDTH)
    joined = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    return joined[torch.tensor(order).argsort()]
