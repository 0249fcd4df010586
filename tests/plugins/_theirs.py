"""What comparing with diffusers' schedulers needs: their settings, their grids in our times, and a start."""

from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import NoiseSchedule, VPTable
from suite.diffusion.prediction import Prediction

START = torch.tensor([[-1.3], [0.4], [1.9]], dtype=torch.float64)


def as_time(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STEPS, TRAINED = 20, 1000
COMMON: dict[str, Any] = {
    "num_train_timesteps": TRAINED,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
KINDS = [Prediction.EPSILON, Prediction.V, Prediction.SAMPLE]
#: diffusers 0.42 calls numpy in a way of before numpy 2.
OLD_NUMPY = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must accept:DeprecationWarning"
)


def predicts(kind: Prediction) -> dict[str, Any]:
    """The kind as schedulers want to be told."""
    return {"prediction_type": str(kind)}


def on_their_grid(betas: Tensor, timesteps: Tensor) -> tuple[NoiseSchedule, Tensor]:
    """Our noise schedule and times for a scheduler's own table: its timestep k is our (k + 1) / T, its end our 0."""
    noise = VPTable(tuple(betas.double().tolist()))
    return noise, torch.cat([(timesteps.double() + 1) / TRAINED, as_time(0.0)])
