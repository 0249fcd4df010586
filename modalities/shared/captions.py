"""Captions of a training set and their token states, packed small enough to be carried with the data."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from suite.modalities.shared.progress import tracked
from suite.modalities.shared.text_encoder import WIDTH, TokenStates

LENGTH = 24
"""Tokens a caption at most."""
LEVELS = (127, 63, 31, 20)
"""Quantisers of token states, finest first."""

Encoder = Callable[[Sequence[str], int], TokenStates]


@dataclass(frozen=True)
class Captioned:
    """Captions of N samples: C texts, the first of them empty; `owners` int64 [C], the sample of each (-1: none).

    Token states stay quantised: `codes` int8 [T, 384] x `scales` float16 [T]; caption c has the rows
    `offsets[c]` to `offsets[c + 1]`.
    """

    captions: tuple[str, ...]
    owners: Tensor
    codes: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)
    offsets: Tensor = field(repr=False)

    def states(self, captions: Tensor | Sequence[int], length: int = LENGTH) -> TokenStates:
        """Token states of the captions with these indices, padded with zeros to `length`; 0 is the null condition."""
        index = torch.as_tensor(captions, dtype=torch.long)
        begin, end = self.offsets[index], self.offsets[index + 1]
        position = begin[:, None] + torch.arange(length)
        mask = position < end[:, None]
        position = position.clamp(max=self.codes.shape[0] - 1)
        states = self.codes[position].float() * self.scales[position].float()[..., None]
        return TokenStates(states * mask[..., None], mask.float())

    def captions_of(self) -> Tensor:
        """Caption indices int64 [N, K], K the most that a sample has; samples with fewer repeat theirs."""
        lists: list[list[int]] = [[] for _ in range(int(self.owners.max()) + 1)]
        for caption, owner in enumerate(self.owners.tolist()):
            if owner >= 0:
                lists[owner].append(caption)
        most = max(len(found) for found in lists)
        return torch.tensor([[found[k % len(found)] for k in range(most)] for found in lists])


def phrasings(name: str, keywords: Sequence[str], rng: random.Random) -> list[str]:
    """Up to four ways to say it: the name; with an article; with two keywords; with three."""
    name = name.replace("\u2019", "'").lower()
    words = [w.replace("_", " ").replace("\xa0", " ") for w in keywords if len(w) > 2 and w.isascii()]
    texts = [name, f"{'an' if name[0] in 'aeiou' else 'a'} {name}"]
    if words:
        for count in (2, 3):
            rng.shuffle(words)
            texts.append(f"{name}, {', '.join(words[:count])}")
    return texts


def quantise(states: Tensor, levels: int = 127) -> tuple[Tensor, Tensor, float]:
    """Rows [T, C] -> int8 codes [T, C] within +-levels, float16 scales [T], relative root-mean-square error.

    Row ~ code x scale: every row is scaled by its own largest value.
    """
    scales = (states.abs().amax(dim=1) / levels).clamp(min=1e-7).half()
    codes = (states / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    residual = (codes.float() * scales.float()[:, None] - states).square().mean().sqrt()
    return codes, scales, float(residual / states.square().mean().sqrt().clamp(min=1e-12))


def encode_all(texts: Sequence[str], encoder: Encoder, batch: int = 256) -> tuple[Tensor, list[int]]:
    """Token states [T, 384] of all texts without padding, and the number of tokens of each."""
    rows, lengths = [], []
    for start in tracked(range(0, len(texts), batch), "Encoding captions", -(-len(texts) // batch)):
        found = encoder(texts[start : start + batch], LENGTH)
        rows.append(found.states[found.mask.bool()])
        lengths += found.mask.sum(dim=1).long().tolist()
    return torch.cat(rows), lengths


def deflate(codes: Tensor) -> Tensor:
    """int8 codes -> packed bytes, uint8 [bytes]."""
    # Codes have no repeats to find, only a narrow distribution: Huffman coding alone is as small and far faster.
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return as_bytes(packer.compress(codes.numpy().tobytes()) + packer.flush())


def inflate(packed: Tensor) -> Tensor:
    """What `deflate` packed -> int8 codes [T, 384]. Raises zlib.error or ValueError when it is damaged."""
    codes = np.frombuffer(zlib.decompress(packed.numpy().tobytes(), wbits=-15), np.int8)
    return torch.from_numpy(codes.reshape(-1, WIDTH).copy())


def as_bytes(content: bytes) -> Tensor:
    """Bytes as uint8 [bytes]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def bounds(lengths: Sequence[int]) -> Tensor:
    """Lengths -> int64 [N + 1]: where each part begins, and the end."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
