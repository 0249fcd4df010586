"""Fit the colours of a mesh to the views of the field that it came from.

Vertices first take the field's colour just below the surface, but what the prior has judged are rendered views, in
which colours at all depths are mixed. Here the colours are fitted to such views; the shape stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from suite.modalities.three_d.camera import HIGH, LOW, Cameras
from suite.modalities.three_d.colours import vertex_colours
from suite.modalities.three_d.field import Field
from suite.modalities.three_d.raster import rasterise

if TYPE_CHECKING:
    from trimesh import Trimesh

SIZE = 64
VIEWS = 14
"""Views to which colours are fitted: all around, at heights between those of the cameras."""
RATE = 0.1


PASSES = 3
"""How often colours are averaged with those of the neighbours: some vertices are hardly seen in any view."""


def refine(mesh: Trimesh, field: Field, steps: int) -> tuple[float, float]:
    """Change the mesh's colours in place; returns the error before and after.

    Errors are mean absolute differences from the field, where the mesh is seen, over four views that no step has
    used. If they did not fall, the colours stay as they were.
    """
    vertices = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
    faces = torch.tensor(np.asarray(mesh.faces), dtype=torch.long)
    raw = torch.tensor(vertex_colours(mesh), dtype=torch.float32).div(255).clamp(0.01, 0.99).logit()
    raw.requires_grad_(True)
    optimiser = torch.optim.Adam([raw], lr=RATE)

    average = _neighbours(mesh)

    def colours() -> Tensor:
        smooth = raw
        for _ in range(PASSES):
            smooth = average(smooth)
        return smooth.sigmoid()

    def seen(cameras: Cameras) -> Callable[[], Tensor]:
        """The error over these views, of the colours as they are when it is asked for."""
        with torch.no_grad():
            target = field.render(cameras, SIZE).pictures.permute(0, 2, 3, 1)
            face, weights = rasterise(vertices, faces, cameras, SIZE)
        hit = face >= 0
        corners, weight, wanted = faces[face[hit]], weights[hit][..., None], target[hit]
        return lambda: ((colours()[corners] * weight).sum(1) - wanted).abs().mean()

    judged = seen(Cameras(torch.arange(4) * (math.pi / 2) + 0.4, torch.full((4,), 0.3)))
    heights = torch.linspace(LOW, HIGH, VIEWS)[torch.randperm(VIEWS, generator=torch.Generator().manual_seed(0))]
    taught = seen(Cameras(torch.arange(VIEWS) * (2 * math.pi / VIEWS), heights))
    before = float(judged().detach())
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        taught().backward()
        optimiser.step()
    after = float(judged().detach())
    if not after < before:
        return before, before
    rgb = (colours().detach() * 255).round().numpy().astype(np.uint8)
    visual: Any = mesh.visual
    visual.vertex_colors = np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], 1)
    return before, after


def _neighbours(mesh: Trimesh) -> Callable[[Tensor], Tensor]:
    """Averages the value [N, 3] of every vertex with those of its neighbours."""
    edges = torch.tensor(np.asarray(mesh.edges_unique), dtype=torch.long).T
    loops = torch.arange(len(mesh.vertices)).expand(2, -1)
    to, of = torch.cat([edges, edges.flip(0), loops], 1)
    share = 1 / to.bincount().float()[:, None]
    return lambda value: torch.zeros_like(value).index_add(0, to, value[of]) * share
