"""Statistics of real clips: what the distances are measured against.

The set that ships, `weights/fluent-anim-reference.safetensors`, is the animated Fluent emoji. To make it again:
python -m suite.modalities.video.metrics.fit_reference FILE, with the file of `suite data prepare video`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.image.metrics import reference as pictures
from suite.modalities.shared.distances import Projection
from suite.modalities.video.metrics.motion import features, motion
from suite.observe.finite import load_finite

AXES = 128
"""Principal axes kept of each kind of feature."""
FRAMES_OF_CLIP = 2
"""Frames of a clip that enter the shipped frame statistics, which keeps the file small."""
FLUENT = Path(__file__).parent / "weights" / "fluent-anim-reference.safetensors"


@dataclass(frozen=True, eq=False)
class Reference:
    """Real clips: statistics of their frames and of their changes, and the motion of each [N]."""

    frames: pictures.Reference
    changes: pictures.Reference
    motion: NDArray[np.float32]


def fit_reference(clips: Sequence[NDArray[np.uint8]], axes: int = AXES) -> Reference:
    """The reference that clips, uint8 [F, H, W, 3] each, make."""
    found = features(clips)
    few = found.frames[:, :: max(1, found.frames.shape[1] // FRAMES_OF_CLIP)].flatten(0, 1)
    moved = np.array([motion(clip) for clip in clips], np.float32)
    return Reference(pictures.fit_reference(few, axes), pictures.fit_reference(found.changes, axes), moved)


def save_reference(reference: Reference, path: Path) -> None:
    """Write float32 means and motion, float16 axes and coordinates."""
    tensors = {"motion": torch.from_numpy(reference.motion)}
    for kind in ("frames", "changes"):
        one: pictures.Reference = getattr(reference, kind)
        tensors[f"{kind}.mean"] = one.projection.mean.float().contiguous()
        tensors[f"{kind}.basis"] = one.projection.basis.half().contiguous()
        tensors[f"{kind}.coordinates"] = one.coordinates.half().contiguous()
    write(path, lambda made: save_file(tensors, made))


@lru_cache(maxsize=4)
def load_reference(path: Path = FLUENT) -> Reference:
    """Read a reference. Raises ConfigError when the file is absent or damaged."""
    try:
        tensors = load_finite(path)

        def one(kind: str) -> pictures.Reference:
            axes = Projection(tensors[f"{kind}.mean"].double(), tensors[f"{kind}.basis"].double())
            return pictures.Reference(axes, tensors[f"{kind}.coordinates"].to(torch.float64))

        return Reference(one("frames"), one("changes"), tensors["motion"].numpy())
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"The reference statistics {path} cannot be read ({error}): reinstall, or make them again with "
            "python -m suite.modalities.video.metrics.fit_reference FILE"
        ) from error
