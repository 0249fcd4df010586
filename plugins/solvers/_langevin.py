"""Langevin steps at one noise level, in every noise family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.diffusion.solver import combine, of_times

if TYPE_CHECKING:  # plugins' modules import this one, and must load without torch
    from torch import Tensor

    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.solver import Denoise


@of_times
def weights(noise: NoiseSchedule, t: Tensor, size: Tensor) -> tuple[Tensor, ...]:
    """x + e score + sqrt(2 e) z with e = size sigma^2: weights of x, x0 and z; the score is -(x - alpha x0)/sigma^2."""
    return 1 - size, size * noise.alpha(t), (2 * size) ** 0.5 * noise.sigma(t)


def langevin(noise: NoiseSchedule, denoise: Denoise, x: Tensor, t: Tensor, size: Coefficient, rng: SampleRng) -> Tensor:
    """One step of `size` relative to sigma_t^2; one evaluation. Its stationary variance is too large by size / 2."""
    return combine(weights(noise, t, size), (x, denoise(x, t), rng.normal_like(x)))
