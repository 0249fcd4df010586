"""Colours of a mesh's vertices: sRGB, as all pictures here are, and the linear values that glTF wants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from trimesh import Trimesh


def vertex_colours(mesh: Trimesh) -> NDArray[np.uint8]:
    """sRGB [V, 3]."""
    colours: Any = mesh.visual
    return np.asarray(colours.vertex_colors)[:, :3]


def linear(srgb: NDArray[Any]) -> NDArray[np.float64]:
    """sRGB values in [0, 1] -> linear ones (IEC 61966-2-1)."""
    values = np.asarray(srgb, np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
