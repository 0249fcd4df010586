"""Statistics of a reference set of pictures: what Fréchet and kernel distances are measured against.

The set that ships, `weights/fluent-reference.safetensors`, is the Fluent 3D emoji, so that both distances need no
pictures of that set. To make it again: python -m suite.modalities.image.metrics.fit_reference
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.image.metrics.features import WIDTH
from suite.modalities.shared.distances import (
    Estimate,
    Projection,
    fit_projection,
    frechet_distance,
    kernel_distance,
    moments,
)
from suite.observe.finite import load_finite

AXES = 256
"""Principal axes kept. With fewer pictures than the 1280 channels a full covariance has no full rank."""

FLUENT = Path(__file__).parent / "weights" / "fluent-reference.safetensors"


@dataclass(frozen=True, eq=False)
class Reference:
    """A set in the space of its own principal axes: `projection` 1280 -> K, `coordinates` [N, K] of its pictures."""

    projection: Projection
    coordinates: Tensor

    def frechet(self, features: Tensor) -> float:
        """Fréchet distance of picture features [n, 1280] in the K axes; biased upwards for small n."""
        return frechet_distance(*moments(self.projection(features)), *moments(self.coordinates))

    def kernel(self, features: Tensor) -> Estimate:
        """Kernel distance of picture features [n, 1280], n >= 4; unbiased.

        Coordinates are divided by one number, the reference's root-mean-square, so that x.x / K is about 1 and the
        cubic kernel weighs its three orders alike.
        """
        scale = self.coordinates.double().square().mean().sqrt().clamp(min=1e-12)
        return kernel_distance(self.projection(features) / scale, self.coordinates.double() / scale)


def fit_reference(features: Tensor, axes: int = AXES) -> Reference:
    """The reference that picture features [N, 1280] make; at most N - 1 axes."""
    projection = fit_projection(features, axes)
    return Reference(projection, projection(features))


def save_reference(reference: Reference, path: Path) -> None:
    """Write float32 mean, float16 axes and coordinates: 1.5 MB for 1,535 pictures and 256 axes."""
    tensors = {
        "mean": reference.projection.mean.float().contiguous(),
        "basis": reference.projection.basis.half().contiguous(),
        "coordinates": reference.coordinates.half().contiguous(),
    }
    write(path, lambda made: save_file(tensors, made))


@lru_cache(maxsize=4)
def load_reference(path: Path = FLUENT) -> Reference:
    """Read a reference. Raises ConfigError when the file is absent or damaged."""
    try:
        tensors = load_finite(path)
        mean, basis, coordinates = tensors["mean"], tensors["basis"], tensors["coordinates"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"The reference statistics {path} cannot be read ({error}): reinstall, or make them again with "
            "python -m suite.modalities.image.metrics.fit_reference"
        ) from error
    if mean.shape != (WIDTH,) or basis.shape != (WIDTH, coordinates.shape[-1]) or coordinates.ndim != 2:
        raise ConfigError(
            f"{path} has shapes {tuple(mean.shape)}, {tuple(basis.shape)}, {tuple(coordinates.shape)}, "
            f"expected ({WIDTH},), ({WIDTH}, K), (N, K)"
        )
    return Reference(Projection(mean.double(), basis.double()), coordinates.to(torch.float64))
