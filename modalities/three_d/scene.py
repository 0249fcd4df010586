"""A radiance field as something to distill into: views from random cameras, of which the prior may be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suite.engine.score_distillation import Representation, Views
from suite.errors import ConfigError
from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.three_d.camera import HIGH, LOW, Cameras, with_camera
from suite.modalities.three_d.field import Field

if TYPE_CHECKING:
    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng

SAMPLES = 40
"""Points a ray."""
RATE = 0.02
"""Learning rate of the grids."""
SMOOTH = 1000.0
"""Weight of the field's roughness."""
FRONTAL = math.radians(25)
"""Highest elevation for a prior that is not told the camera: its pictures show things from the front."""
SKIP_EVERY = 10
"""Iterations between looks at which cells are empty."""


@dataclass
class FieldScene(Representation):
    """One field and its prompt.

    Attributes:
        field: the field.
        cond: conditioning of each branch, one row: `states` [1, L, 384], `mask` [1, L].
        size: pixels of a view, those of the prior.
        count: views an iteration.
        told: whether the prior is told the camera.
    """

    field: Field
    cond: Mapping[str, Cond]
    size: int
    count: int
    told: bool
    iterations: int = 0

    def views(self, progress: float, rng: SampleRng) -> Views:
        """From `count` cameras: azimuths evenly apart from a random start, elevations at random."""
        del progress
        first, low = rng.uniform((1,))[0], rng.uniform((self.count,))[0]
        azimuth = 2 * math.pi * (first + torch.arange(self.count) / self.count)
        high = HIGH if self.told else FRONTAL
        cameras = Cameras(azimuth, LOW + (high - LOW) * low)
        jitter = torch.Generator().manual_seed(int(float(rng.uniform((1,))) * 2**24))
        shown = self.field.render(cameras, self.size, SAMPLES, jitter)
        facts = {"opacity": float(shown.opacity.detach().mean()), "points": shown.share}
        return Views(shown.pictures * 2 - 1, self.conditions(cameras), SMOOTH * self.field.roughness(), facts)

    def conditions(self, cameras: Cameras) -> dict[str, Cond]:
        """Conditioning of each branch with a row a camera."""
        return {name: seen_from(row, cameras, self.told) for name, row in self.cond.items()}

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.field.parameters(), lr=RATE, betas=(0.9, 0.99))

    def updated(self, progress: float) -> None:
        del progress
        self.iterations += 1
        if self.iterations % SKIP_EVERY == 0:
            self.field.find_occupied()

    def state(self) -> dict[str, Tensor]:
        return dict(self.field.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        try:
            self.field.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ConfigError(f"the checkpoint is of another field: {str(error).splitlines()[0]}") from error


def seen_from(row: Cond, cameras: Cameras, told: bool) -> dict[str, Any]:
    """One row of conditioning, repeated for each camera; with the camera's token if the prior is told it."""
    count = len(cameras)
    states, mask = row["states"].expand(count, -1, -1), row["mask"].expand(count, -1)
    text = with_camera(TokenStates(states, mask), cameras) if told else TokenStates(states, mask)
    return {"states": text.states, "mask": text.mask}
