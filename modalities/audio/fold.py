"""Pictures of sound <-> what the network sees: a patch of bands x frames becomes the channels of one position."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.audio.mel import BANDS, FRAMES


def folded_shape(patch: Sequence[int]) -> tuple[int, int, int]:
    """[channels, rows, columns] of a folded picture; ConfigError if `patch` (bands, frames) does not divide it."""
    if len(patch) != 2 or min(patch) < 1 or BANDS % patch[0] or FRAMES % patch[1]:
        raise ConfigError(f"fold is {list(patch)}, expected [bands, frames] that divide {BANDS} and {FRAMES}")
    return patch[0] * patch[1], BANDS // patch[0], FRAMES // patch[1]


def fold(pictures: Tensor, patch: Sequence[int]) -> Tensor:
    """[N, 80, 128] -> [N, bands x frames, 80 / bands, 128 / frames]."""
    channels, rows, columns = folded_shape(patch)
    parts = pictures.reshape(-1, rows, patch[0], columns, patch[1])
    return parts.permute(0, 2, 4, 1, 3).reshape(-1, channels, rows, columns)


def unfold(x: Tensor, patch: Sequence[int]) -> Tensor:
    """The inverse of `fold`."""
    _, rows, columns = folded_shape(patch)
    parts = x.reshape(-1, patch[0], patch[1], rows, columns)
    return parts.permute(0, 3, 1, 4, 2).reshape(-1, BANDS, FRAMES)
