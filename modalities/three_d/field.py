"""A radiance field: density and colour on grids of several resolutions, rendered by marching along rays.

Plain torch, so that it runs everywhere. Colour is that of the surface and does not depend on the direction
(light is in it, as it is in the training pictures of the priors). Quadrature of NeRF (Mildenhall 2020, eq. 3):
C = sum_i T_i (1 - exp(-density_i delta_i)) c_i + T_end white.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suite.modalities.three_d.camera import DISTANCE, Cameras

RESOLUTIONS = (8, 16, 32, 64)
"""Grids whose sum is the field: what is coarse is learnt first and stays smooth."""
CHANNELS = 4
"""Density and three colours."""
BLOB = 0.5
"""Radius of the ball of density that a field starts as; rays into emptiness alone would learn nothing."""
DENSITY = 30.0
"""Density, per unit of length, of a raw value of 1: a thin wall must be able to be opaque."""
EMPTY = 0.01
"""Opacity of one step below which a cell counts as empty."""


@dataclass(frozen=True)
class Rendering:
    """`pictures` [V, 3, S, S] in [0, 1] on white, `opacity` [V, S, S], and `share` of the ray points that were used."""

    pictures: Tensor
    opacity: Tensor
    share: float


class Field(nn.Module):
    """The field inside the unit ball. Parameters: one grid [1, 4, R, R, R] a resolution, axes z, y, x."""

    def __init__(self, resolutions: tuple[int, ...] = RESOLUTIONS, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.resolutions = resolutions
        self.grids = nn.ParameterList(
            nn.Parameter(0.01 * torch.randn(1, CHANNELS, r, r, r, generator=generator)) for r in resolutions
        )
        self.register_buffer("occupied", torch.ones(1, 1, *[resolutions[-1] // 2] * 3))
        self.occupied: Tensor

    def grid(self) -> Tensor:
        """The sum of all grids at the finest resolution, [1, 4, R, R, R]: raw density with the blob, raw colours."""
        fine = self.resolutions[-1]
        total = self.grids[-1]
        for part in self.grids[:-1]:
            total = total + F.interpolate(part, size=(fine, fine, fine), mode="trilinear", align_corners=True)
        return total + _blob(fine, total)

    def query(self, points: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Density [N] per unit length and colour [N, 3] in [0, 1] at `points` [N, 3]."""
        raw = lookup(self.grid() if grid is None else grid, points)
        inside = (points.norm(dim=-1) < 1).to(raw)
        return DENSITY * F.softplus(raw[:, 0]) * inside, torch.sigmoid(raw[:, 1:])

    def render(
        self, cameras: Cameras, size: int, samples: int = 48, generator: torch.Generator | None = None
    ) -> Rendering:
        """Views of the field. `samples` points a ray, jittered by `generator` or at the middles of intervals."""
        origins, directions = (r.reshape(-1, 3) for r in cameras.rays(size))
        # The ball is crossed where |o + d s| = 1: s = -o.d -+ sqrt((o.d)^2 - (|o|^2 - 1)).
        middle = -(origins * directions).sum(-1)
        square = middle**2 - (DISTANCE**2 - 1)
        half = square.clamp(min=0).sqrt()
        step = 2 * half / samples
        offset = torch.rand(len(middle), 1, generator=generator) if generator is not None else 0.5
        along = (middle - half)[:, None] + (torch.arange(samples) + offset) * step[:, None]
        points = origins[:, None] + directions[:, None] * along[..., None]
        with torch.no_grad():
            flat = points.reshape(-1, 3)
            used = (lookup(self.occupied, flat)[:, 0] > 0) & (square > 0).repeat_interleave(samples)
            index = used.nonzero()[:, 0]
        density, colour = self.query(flat[index], self.grid())
        rays = len(middle)
        optical = flat.new_zeros(rays * samples).index_put((index,), density * step[index // samples])
        optical = optical.view(rays, samples)
        through = torch.exp(-torch.cat([optical.new_zeros(rays, 1), optical.cumsum(1)], 1))  # T_i, and T_end
        weights = (through[:, :-1] - through[:, 1:]).reshape(-1)
        lit = flat.new_zeros(rays, 3).index_add(0, index // samples, weights[index, None] * colour)
        pictures = lit + through[:, -1:]
        shape = (len(cameras), size, size)
        opacity = (1 - through[:, -1]).view(shape)
        return Rendering(pictures.view(*shape, 3).permute(0, 3, 1, 2), opacity, len(index) / max(1, len(flat)))

    @torch.no_grad()
    def find_occupied(self) -> None:
        """Remember which cells hold anything, with one cell of margin; the others are skipped by `render`."""
        cells = self.occupied.shape[-1]
        density = DENSITY * F.softplus(self.grid()[:, :1])
        opacity = 1 - torch.exp(-density * (2 / self.resolutions[-1]))
        coarse = F.adaptive_max_pool3d(opacity, cells)
        self.occupied.copy_((F.max_pool3d(coarse, 3, 1, 1) > EMPTY).to(self.occupied))

    def roughness(self) -> Tensor:
        """Mean square difference of neighbours in the finest grids: a prior for smooth surfaces and colours."""
        grid = self.grids[-1]
        parts = [grid.diff(dim=d).square().mean() for d in (2, 3, 4)]
        return torch.stack(parts).sum()


def _blob(size: int, like: Tensor) -> Tensor:
    """Raw density of the start: positive inside BLOB, clearly negative far out (DreamFusion, appendix A.2)."""
    line = torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt()
    bias = 10 * (1 - radius / BLOB).clamp(min=-0.8, max=0.3)
    out = like.new_zeros(1, CHANNELS, size, size, size)
    out[0, 0] = bias - 2
    return out


def lookup(grid: Tensor, points: Tensor) -> Tensor:
    """Trilinear values [N, C] of a grid [1, C, R, R, R] over [-1, 1]^3 at `points` [N, 3] as (x, y, z)."""
    found = F.grid_sample(grid, points.view(1, -1, 1, 1, 3), align_corners=True, padding_mode="border")
    return found[0, :, :, 0, 0].T
