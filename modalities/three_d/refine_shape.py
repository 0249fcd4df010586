"""Move the vertices of a mesh to the silhouettes of the field that it came from, by pytorch3d's soft rasteriser.

Marching cubes puts the surface where the density passes one level, the same for thick and thin parts. What the prior
has judged are rendered views, and where those are opaque is what counts. The silhouette of a mesh is made soft, and so
differentiable (SoftRas, Liu 2019, 1904.01786, eq. 1 and 5): with d the signed squared distance of a pixel to a face's
outline in the picture, negative inside,

    alpha = 1 - prod_faces sigmoid(d / SOFT).

Vertices follow the mean square difference from the field's opacity, held back by the umbrella Laplacian.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from suite.modalities.three_d.camera import HIGH, LOW, Cameras
from suite.modalities.three_d.field import Field
from suite.modalities.three_d.raster import fragments, rasterise, require

if TYPE_CHECKING:
    from trimesh import Trimesh

SIZE = 32
"""Pixels of a silhouette. On a CPU pytorch3d's gradient takes some 20 us for each pixel and face that it looks at."""
VIEWS = 8
"""Silhouettes in all, one of which a step is taken on."""
SOFT = 1e-3
"""Width of the edge, in squared units of half a picture: one pixel or so."""
FACES = 24
"""Faces that are looked at in a pixel, nearest first."""
CUTOFF = 1e-4
"""What a face farther away than the rasteriser looks would have added to alpha."""
RATE = 1e-2
STIFF = 30.0
"""Weight of the Laplacian."""


def refine_shape(mesh: Trimesh, field: Field, steps: int) -> tuple[float, float]:
    """Move the mesh's vertices in place; returns the error before and after.

    Errors are mean absolute differences of hard silhouettes from the field's opacity over four views that no step has
    used. If they did not fall, or the mesh would no longer be closed with its normals outward, nothing moves.

    Raises:
        ConfigError: pytorch3d's compiled part is missing.
    """
    require("refine-shape")
    start = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
    faces = torch.tensor(np.asarray(mesh.faces), dtype=torch.long)
    moved = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=RATE)
    heights = torch.linspace(LOW, HIGH, VIEWS)[torch.randperm(VIEWS, generator=torch.Generator().manual_seed(1))]
    taught = Cameras(torch.arange(VIEWS) * (2 * math.pi / VIEWS), heights)
    judged = Cameras(torch.arange(4) * (math.pi / 2) + 0.4, torch.full((4,), 0.3))
    with torch.no_grad():
        wanted, ideal = field.render(taught, SIZE).opacity, field.render(judged, SIZE).opacity
    bend, before = _laplacian(mesh), _error(start, faces, judged, ideal)
    for step in range(steps):
        view = step % VIEWS
        camera = Cameras(taught.azimuth[view : view + 1], taught.elevation[view : view + 1])
        optimiser.zero_grad(set_to_none=True)
        difference = soft_silhouettes(start + moved, faces, camera, SIZE) - wanted[view]
        loss = difference.square().mean() + STIFF * bend(moved).square().sum(-1).mean()
        loss.backward()
        optimiser.step()
    ends = (start + moved).detach()
    after = _error(ends, faces, judged, ideal)
    if not (after < before and _keeps_its_side(mesh, ends)):
        return before, before
    mesh.vertices = ends.double().numpy()
    return before, after


def soft_silhouettes(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> Tensor:
    """alpha [V, size, size], differentiable in `vertices` [N, 3]."""
    reach = math.log(1 / CUTOFF - 1) * SOFT
    found, _, distance = fragments(vertices, faces, cameras, size, blur_radius=reach, faces_per_pixel=FACES)
    outside = torch.where(found >= 0, torch.sigmoid(distance / SOFT), torch.ones_like(distance))
    return 1 - outside.prod(-1)


def _error(vertices: Tensor, faces: Tensor, cameras: Cameras, opacity: Tensor) -> float:
    seen, _ = rasterise(vertices, faces, cameras, opacity.shape[-1])
    return float(((seen >= 0).float() - opacity).abs().mean())


def _laplacian(mesh: Trimesh) -> Any:
    """Value [N, 3] of every vertex less the mean of its neighbours'."""
    edges = torch.tensor(np.asarray(mesh.edges_unique), dtype=torch.long).T
    to, of = torch.cat([edges, edges.flip(0)], 1)
    share = 1 / to.bincount(minlength=len(mesh.vertices)).clamp(min=1).float()[:, None]
    return lambda value: value - torch.zeros_like(value).index_add(0, to, value[of]) * share


def _keeps_its_side(mesh: Trimesh, vertices: Tensor) -> bool:
    """Whether the moved mesh is as closed as it was and its normals still point outward."""
    after = mesh.copy()
    after.vertices = vertices.double().numpy()
    return bool(after.is_watertight >= mesh.is_watertight and after.volume > 0)
