"""From a field to a closed mesh with coloured vertices: marching cubes, cleaning, checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from suite.errors import ConfigError
from suite.modalities.three_d.field import Field, lookup

if TYPE_CHECKING:
    from trimesh import Trimesh

LEVEL = -1.0
"""Raw density at the surface. There two cells of the finest grid let about half the light through: a higher level would
lose thin parts, a lower one take in haze."""
KEPT = 0.1
"""A part that floats apart stays if its surface is at least this share of the largest part's."""
SMOOTHING = 8
"""Passes of Taubin's filter, which rounds the steps of the grid without shrinking."""


def extract(field: Field, resolution: int = 96) -> Trimesh | None:
    """The surface of a field as a closed mesh, normals outward, or None if the field has none.

    The surface is where the raw density is LEVEL.
    """
    measure, trimesh = _libraries()
    with torch.no_grad():
        grid = field.grid()
        line = torch.linspace(-1, 1, resolution)
        x, y, z = torch.meshgrid(line, line, line, indexing="ij")
        points = torch.stack([x, y, z], -1).reshape(-1, 3)
        raw = lookup(grid, points)[:, 0]
        raw = torch.where(points.norm(dim=-1) < 1, raw, raw.new_tensor(-10.0)).clamp(-10, 10)
    # A border of emptiness closes what touches the edge of the cube.
    volume = np.pad(raw.view(resolution, resolution, resolution).numpy(), 1, constant_values=-10.0)
    if not (volume > LEVEL).any():
        return None
    vertices, faces, _, _ = measure.marching_cubes(volume, LEVEL)
    cell = 2 / (resolution - 1)
    mesh = trimesh.Trimesh((vertices - 1) * cell - 1, faces, process=True)
    mesh = clean(mesh)
    if mesh is None:
        return None
    inward = torch.tensor(mesh.vertices - 0.75 * cell * mesh.vertex_normals, dtype=torch.float32)
    with torch.no_grad():
        _, colours = field.query(inward, grid)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=(colours * 255).round().numpy().astype(np.uint8))
    return mesh


def clean(mesh: Trimesh) -> Trimesh | None:
    """Without crumbs, smoothed, holes of a face or two filled, normals outward; None if nothing is left."""
    _, trimesh = _libraries()
    # Only faces that lost a corner when equal vertices were merged: to drop thin ones would open holes.
    ordered = np.sort(mesh.faces, axis=1)
    mesh.update_faces((np.diff(ordered, axis=1) > 0).all(axis=1))
    parts = mesh.split(only_watertight=False)
    if not len(parts):
        return None
    largest = max(part.area for part in parts)
    kept = [part for part in parts if part.area >= KEPT * largest]
    whole = trimesh.util.concatenate(kept)
    trimesh.smoothing.filter_taubin(whole, iterations=SMOOTHING)
    if not whole.is_watertight:
        trimesh.repair.fill_holes(whole)
    if whole.volume < 0:
        whole.invert()
    return whole


def _libraries() -> tuple[Any, Any]:
    try:
        import trimesh
        from skimage import measure
    except ImportError as error:
        raise ConfigError(
            f"Meshes need the package {error.name}, which is not installed. "
            "Type: pip install efficient-diffusion-suite[3d]"
        ) from None
    return measure, trimesh
