"""Pictures of meshes by pytorch3d's rasteriser: the training views, and the differentiable refinement."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.three_d.camera import Cameras
from suite.modalities.three_d.sources import Surface

LIGHT = (0.0, 0.85, 0.527)
"""Direction towards the lamp, fixed in the world, so that a surface has one colour from everywhere.

It stands before and above the object, neither left nor right: the mirror image of a view is a view of the mirrored
object.
"""


@lru_cache(maxsize=1)
def why_absent() -> str:
    """Empty if pytorch3d's compiled rasteriser loads, else one line that says what is missing and what to type."""
    advice = "pip install easypytorch3d (it needs PyPI's torch, not a CPU-only build)"
    try:
        importlib.import_module("pytorch3d._C")
    except (ImportError, OSError) as error:
        reason = str(error).strip().splitlines()
        return f"pytorch3d's rasteriser is missing ({reason[0] if reason else type(error).__name__}): {advice}"
    return ""


def require(what: str) -> None:
    """ConfigError, in the name of `what` was asked for, if pytorch3d's rasteriser does not load."""
    if reason := why_absent():
        raise ConfigError(f"{what}: {reason}")


def rasterise(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """The nearest face at each pixel: indices [V, S, S] (-1 for none) and barycentric weights [V, S, S, 3].

    Exact, in plain torch, not differentiable: every face is tried at the pixels of its own bounding box only.
    pytorch3d's rasteriser on a CPU tries every face at every pixel, 5 ns each: for the 820 meshes of the training
    set, up to 50,000 faces each, that is hours against minutes (`differentiable` agrees with this, see the tests).
    Weights are perspective-correct. All vertices must be in front of the camera.
    """
    found = torch.full((len(cameras), size * size), -1, dtype=torch.long, device=vertices.device)
    weights = torch.zeros(len(cameras), size * size, 3, device=vertices.device)
    for view, where in enumerate(cameras.project(vertices)):
        corners = where[faces]  # [F, 3 corners, (x, y, depth)]
        x, y = (corners[..., 0] + 1) * (size / 2), (1 - corners[..., 1]) * (size / 2)
        face, pixel, weight, depth = _covered(x, y, corners[..., 2], size)
        nearest = torch.full((size * size,), torch.inf, device=x.device).scatter_reduce(0, pixel, depth, "amin")
        # On an edge that two faces share both are nearest: the later pair wins, by rule and not by thread.
        wins = (depth == nearest[pixel]).nonzero()[:, 0]
        last = torch.full((size * size,), -1, device=x.device).scatter_reduce(0, pixel[wins], wins, "amax")
        wins = last[last >= 0]
        found[view, pixel[wins]] = face[wins]
        weights[view, pixel[wins]] = weight[wins]
    return found.view(-1, size, size), weights.view(-1, size, size, 3)


def _covered(x: Tensor, y: Tensor, depth: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All (face, pixel) pairs where a pixel's centre lies in a face: face, pixel, weights [.., 3] and depth.

    `x`, `y` [F, 3] in pixels, `depth` [F, 3].
    """
    left = (x.amin(1) - 0.5).ceil().clamp(min=0).long()
    right = (x.amax(1) - 0.5).floor().clamp(max=size - 1).long()
    top = (y.amin(1) - 0.5).ceil().clamp(min=0).long()
    bottom = (y.amax(1) - 0.5).floor().clamp(max=size - 1).long()
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    width = (right - left + 1).clamp(min=0)
    count = width * (bottom - top + 1).clamp(min=0) * (area.abs() > 1e-9)
    face = torch.repeat_interleave(count)
    place = torch.arange(len(face), device=x.device) - (count.cumsum(0) - count)[face]
    column, row = left[face] + place % width[face], top[face] + place // width[face]
    u, v = column + 0.5, row + 0.5
    # Signed areas of the three triangles that the pixel makes with the edges, over the face's own.
    fx, fy = x[face], y[face]
    shares = [((fx[:, j] - u) * (fy[:, k] - v) - (fx[:, k] - u) * (fy[:, j] - v)) for j, k in ((1, 2), (2, 0), (0, 1))]
    flat = torch.stack(shares, 1) / area[face][:, None]
    inside = (flat >= 0).all(1)
    face, flat = face[inside], flat[inside]
    nearness = flat / depth[face]
    total = nearness.sum(1, keepdim=True)
    return face, (row * size + column)[inside], nearness / total, 1 / total[:, 0]


def differentiable(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """`rasterise` by pytorch3d, with weights that are differentiable in `vertices`.

    Raises ConfigError when its compiled part is missing.
    """
    found, weights, _ = fragments(vertices, faces, cameras, size, faces_per_pixel=1, perspective_correct=True)
    found, weights = found[..., 0], weights[..., 0, :]
    first = torch.arange(len(cameras), device=found.device).view(-1, 1, 1) * faces.shape[0]
    return torch.where(found >= 0, found - first, found), weights


def fragments(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int, **settings: Any) -> tuple[Tensor, ...]:
    """pytorch3d's own answer, differentiable in `vertices`: for the K nearest faces of each pixel [V, S, S, K] their
    indices (counted through all views, -1 for none), barycentric weights [.., 3], and signed squared distances.

    Raises ConfigError when its compiled part is missing.
    """
    require("differentiable rasterisation")
    from pytorch3d.renderer.mesh import rasterize_meshes
    from pytorch3d.structures import Meshes

    # pytorch3d's x axis points to the left.
    where = cameras.project(vertices) * vertices.new_tensor([-1.0, 1.0, 1.0])
    meshes: Any = Meshes(list(where), [faces] * len(cameras))
    found, _, weights, distance = rasterize_meshes(meshes, size, bin_size=0, cull_backfaces=False, **settings)
    return found, weights, distance


def views(surface: Surface, cameras: Cameras, size: int, oversample: int = 2) -> Tensor:
    """Pictures [V, 3, size, size] in [0, 1] on white, lit by one lamp and the sky; `oversample`^2 rays a pixel."""
    vertices, faces = torch.from_numpy(surface.vertices), torch.from_numpy(surface.faces)
    face, weights = rasterise(vertices, faces, cameras, size * oversample)
    normals = F.normalize(_normals(vertices, faces), dim=-1)
    page = torch.ones(*face.shape, 3)
    hit = face >= 0
    index, weight = face[hit], weights[hit]
    colour = (torch.from_numpy(surface.colours)[index] * weight[..., None]).sum(1)
    texture = torch.from_numpy(surface.texture)[index]
    uv = (torch.from_numpy(surface.uv)[index] * weight[..., None]).sum(1)
    for k, image in enumerate(surface.textures):
        mine = texture == k
        if mine.any():
            colour[mine] = _texels(torch.from_numpy(image), uv[mine])
    view = torch.arange(len(cameras)).view(-1, 1, 1).expand_as(face)[hit]
    towards = cameras.positions[view] - vertices[faces[index]].mean(1)
    normal = normals[index]
    # Many meshes are wound either way: the side that is seen is the outside.
    normal = torch.where((normal * towards).sum(-1, keepdim=True) < 0, -normal, normal)
    page[hit] = (colour * shade(normal)).clamp(0, 1)
    return F.avg_pool2d(page.permute(0, 3, 1, 2), oversample)


def shade(normals: Tensor) -> Tensor:
    """How bright surfaces with these unit normals [..., 3] are: [..., 1]."""
    lamp = (normals * normals.new_tensor(LIGHT)).sum(-1, keepdim=True).clamp(min=0)
    return 0.62 + 0.12 * normals[..., 1:2] + 0.32 * lamp


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[faces].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def _texels(image: Tensor, uv: Tensor) -> Tensor:
    height, width = image.shape[:2]
    x = (uv[:, 0].remainder(1) * width).long().clamp(max=width - 1)
    y = ((1 - uv[:, 1]).remainder(1) * height).long().clamp(max=height - 1)
    return image[y, x]
