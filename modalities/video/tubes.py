"""Clips <-> tubes: a lossless linear code that puts the motion of a few frames into channels.

Each run of `length` frames of a pixel becomes its discrete cosine transform (DCT-II, orthonormal; Ahmed et al. 1974)
divided by sqrt(length), so that coefficient 0 is the mean picture of the tube, in the range of a picture. The other
coefficients tell how it changes, and are multiplied by `gain`: motion is small beside appearance, and would otherwise
be the last thing that appears out of the noise. Channels of a code are [mean RGBA, first change RGBA, ...].

From tube to tube most of a clip stays the same, so most of the noise should too (Ge et al. 2023, arXiv 2305.10474:
"mixed" noise). `together` makes it so without the engine knowing: it maps coordinates whose noise is independent to
codes whose noise is shared between tubes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from suite.errors import ConfigError


def to_tubes(clip: Tensor, length: int, gain: float) -> Tensor:
    """Clips [B, C, F, H, W] -> codes [B, length C, F / length, H, W], same float type."""
    batch, channels, frames, height, width = clip.shape
    if frames % length:
        raise ConfigError(f"A clip of {frames} frames does not fill tubes of {length}: expected a multiple")
    parts = clip.reshape(batch, channels, frames // length, length, height, width)
    code = torch.einsum("kj,bctjhw->bkcthw", _forward(length, gain).to(clip), parts)
    return code.reshape(batch, length * channels, frames // length, height, width)


def from_tubes(code: Tensor, length: int, gain: float) -> Tensor:
    """The inverse of `to_tubes`."""
    batch, channels, tubes, height, width = code.shape
    if channels % length:
        raise ConfigError(f"A code of {channels} channels does not hold {length} coefficients: expected a multiple")
    parts = code.reshape(batch, length, channels // length, tubes, height, width)
    clip = torch.einsum("jk,bkcthw->bctjhw", _inverse(length, gain).to(code), parts)
    return clip.reshape(batch, channels // length, tubes * length, height, width)


def together(x: Tensor, shared: float) -> Tensor:
    """Coordinates [B, C, T, H, W] -> codes: independent unit noise becomes unit noise of correlation `shared`.

    `shared` is in [0, 1). This is the symmetric square root of that correlation over the T tubes, which scales their
    mean and what deviates from it.
    """
    mean = x.mean(2, keepdim=True)
    return math.sqrt(1 + shared * (x.shape[2] - 1)) * mean + math.sqrt(1 - shared) * (x - mean)


def apart(code: Tensor, shared: float) -> Tensor:
    """The inverse of `together`."""
    mean = code.mean(2, keepdim=True)
    return mean / math.sqrt(1 + shared * (code.shape[2] - 1)) + (code - mean) / math.sqrt(1 - shared)


@lru_cache(maxsize=8)
def _forward(length: int, gain: float) -> Tensor:
    k, j = torch.arange(length)[:, None].double(), torch.arange(length)[None].double()
    basis = torch.cos(math.pi * k * (2 * j + 1) / (2 * length)) * math.sqrt(2) / length
    basis[0] = 1 / length
    basis[1:] *= gain
    return basis


@lru_cache(maxsize=8)
def _inverse(length: int, gain: float) -> Tensor:
    return torch.linalg.inv(_forward(length, gain))
