"""Cameras on a sphere around the object: where they stand, the rays they see, and what a network is told of them.

Right-handed coordinates, y up; the front of an object looks along +z. Azimuth 0 sees the front, 90 degrees the
side at +x; elevation is positive from above. Objects lie inside the unit ball, and every camera sees just all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.modalities.shared.text_encoder import TokenStates

DISTANCE = 3.0
"""From the origin to a camera."""
TANGENT = 1 / math.sqrt(DISTANCE**2 - 1)
"""Of half the field of view: the unit ball touches the edge of the picture."""
LOW, HIGH = math.radians(-10), math.radians(65)
"""Elevations between which cameras stand."""


@dataclass(frozen=True)
class Cameras:
    """V cameras. `azimuth` and `elevation` are float32 [V] in radians."""

    azimuth: Tensor
    elevation: Tensor

    def __len__(self) -> int:
        return self.azimuth.shape[0]

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on another device."""
        return Cameras(self.azimuth.to(device), self.elevation.to(device))

    @property
    def positions(self) -> Tensor:
        """[V, 3]."""
        a, e = self.azimuth, self.elevation
        return DISTANCE * torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], -1)

    @property
    def frames(self) -> Tensor:
        """[V, 3, 3]: rows are the camera's right, up and forward, in world coordinates."""
        a, e = self.azimuth, self.elevation
        zero = torch.zeros_like(a)
        # Not by a cross product with the world's up: that is undefined straight from above.
        right = torch.stack([a.cos(), zero, -a.sin()], -1)
        forward = -self.positions / DISTANCE
        up = torch.stack([-e.sin() * a.sin(), e.cos(), -e.sin() * a.cos()], -1)
        return torch.stack([right, up, forward], -2)

    def rays(self, size: int) -> tuple[Tensor, Tensor]:
        """Origins and unit directions [V, size, size, 3] through the centres of pixels, rows from the top."""
        grid = (torch.arange(size, device=self.azimuth.device) + 0.5) * 2 / size - 1
        y, x = torch.meshgrid(-grid, grid, indexing="ij")
        local = torch.stack([TANGENT * x, TANGENT * y, torch.ones_like(x)], -1)
        directions = torch.einsum("hwi,vij->vhwj", local, self.frames)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.positions[:, None, None].expand_as(directions), directions

    def project(self, points: Tensor) -> Tensor:
        """Points [N, 3] -> [V, N, 3]: x to the right and y up in units of half the picture, and depth."""
        local = torch.einsum("vij,vnj->vni", self.frames, points[None] - self.positions[:, None])
        depth = local[..., 2:]
        return torch.cat([local[..., :2] / (depth * TANGENT), depth], -1)


def ring(count: int, elevation: float = math.radians(15)) -> Cameras:
    """Evenly spaced azimuths, the front first, at one elevation (radians)."""
    return Cameras(torch.arange(count) * (2 * math.pi / count), torch.full((count,), elevation))


def token(cameras: Cameras, width: int) -> Tensor:
    """What a network is told: [V, width] float32, sines and cosines of azimuth and elevation and their products.

    All features are periodic in azimuth, and fade at the poles, where azimuth means nothing for the object's side
    that is seen. Repeated to fill `width`, scaled to the size of a text encoder's states (mean square about 0.14).
    """
    a, e = cameras.azimuth, cameras.elevation
    features = [e.sin(), e.cos(), (2 * e).sin(), (2 * e).cos()]
    for k in (1, 2, 3, 4):
        features += [e.cos() * (k * a).sin(), e.cos() * (k * a).cos()]
    row = torch.stack(features, -1) * 0.6
    return row.repeat(1, -(-width // row.shape[1]))[:, :width]


def with_camera(text: TokenStates, cameras: Cameras) -> TokenStates:
    """Encoded prompts [N, L, C] with one more token that tells the camera: [N, L + 1, C]. One camera a prompt.

    The camera goes in where words do, so a network of an unchanged class can be told of it, and it stays when the
    words are dropped: guidance then pushes towards the words, not towards the view.
    """
    view = token(cameras, text.states.shape[-1]).to(text.states)[:, None]
    return TokenStates(
        torch.cat([text.states, view], 1), torch.cat([text.mask, text.mask.new_ones(len(cameras), 1)], 1)
    )
