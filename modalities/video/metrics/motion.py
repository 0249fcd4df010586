"""What moves in a clip: features of frames and of changes, the amount of motion, and how even it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image.metrics import features as of_pictures

MOMENTS = 6
"""Evenly spread frames of a clip that are looked at, each with the change to its next one."""


@dataclass(frozen=True, eq=False)
class Features:
    """EfficientNet-Lite0 features: `frames` [N, MOMENTS, 1280]; `changes` [N, 1280], averaged over the moments."""

    frames: Tensor
    changes: Tensor

    @property
    def pooled(self) -> Tensor:
        """Every frame a row: [N MOMENTS, 1280]."""
        return self.frames.flatten(0, 1)


def features(clips: Sequence[NDArray[np.uint8]]) -> Features:
    """Features of clips, uint8 [F, H, W, 3] each; F and sizes may differ between clips.

    A change is the picture (next - this) / 2 around mid-grey, so that what stands still is plain grey and the
    distance of changes does not see still content. After the last frame comes the first: clips are loops.
    """
    frames, changes = [], []
    for clip in clips:
        check_clip(clip)
        here = np.arange(MOMENTS) * len(clip) // MOMENTS
        this, following = clip[here], clip[(here + 1) % len(clip)]
        change = (following.astype(np.int16) - this) // 2 + 128
        pictures = np.concatenate([this, change.clip(0, 255).astype(np.uint8)])
        found = of_pictures(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        frames.append(found[:MOMENTS])
        changes.append(found[MOMENTS:].mean(0))
    return Features(torch.stack(frames), torch.stack(changes))


def motion(clip: NDArray[np.uint8]) -> float:
    """Mean absolute change of a value from a frame to the next of the loop, in 8-bit levels."""
    check_clip(clip)
    x = clip.astype(np.float32)
    return float(np.abs(np.roll(x, -1, 0) - x).mean())


def flicker(clip: NDArray[np.uint8]) -> float:
    """|x(k+1) - 2 x(k) + x(k-1)| over |x(k+1) - x(k-1)|, both as root mean squares inside the clip.

    0 for even change, sqrt(3) for independent frames, above it for what jumps to and fro; 0 for a still.
    """
    check_clip(clip)
    x = clip.astype(np.float32)
    bend = np.square(x[2:] - 2 * x[1:-1] + x[:-2]).mean()
    change = np.square(x[2:] - x[:-2]).mean()
    return float(np.sqrt(bend / change)) if change > 0 else float("inf") if bend > 0 else 0.0


def steadiness(frames: Tensor) -> float:
    """Mean cosine of the features [N, MOMENTS, 1280] of successive looked-at frames; 1 for stills."""
    return float(F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1).mean())


def check_clip(clip: NDArray[np.uint8]) -> None:
    """Raise ConfigError unless `clip` is uint8 [F, H, W, 3] with F of 3 or more."""
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.shape[0] < 3 or clip.dtype != np.uint8:
        raise ConfigError(
            f"A clip has shape {clip.shape} and type {clip.dtype}, expected uint8 [3 frames or more, height, width, 3]"
        )
