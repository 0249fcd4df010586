"""What solvers that draw noise share: the forward kernel, the posterior, and the reverse SDE's coefficients.

With a = alpha_t / alpha_s the forward process goes from s to a noisier t by x_t = a x_s + sqrt(sigma_t^2 - a^2
sigma_s^2) z, in every noise family. As an SDE it is dx = f x dt + g dw, f = d log alpha / dt and
g^2 = -2 sigma^2 d lam / dt, lam = log(alpha / sigma).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.diffusion.solver import combine, of_times

if TYPE_CHECKING:  # plugins' modules import this one, and must load without torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng


@of_times
def forward_weights(noise: NoiseSchedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of x_s and of fresh noise in x_t, t >= s; needs alpha_s > 0."""
    keep = noise.alpha(t) / noise.alpha(s)
    return keep, (noise.sigma(t) ** 2 - (keep * noise.sigma(s)) ** 2).clamp(min=0).sqrt()


def noised(noise: NoiseSchedule, x: Tensor, s: Tensor, t: Tensor, rng: SampleRng) -> Tensor:
    """x at time s taken forward to the noisier time t >= s, exactly in law."""
    return combine(forward_weights(noise, s, t), (x, rng.normal_like(x)))


@of_times
def posterior_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x, x0 and noise in the posterior of x_s given x_t and x0: mean and deviation; finite at both ends."""
    alpha_t, sigma_t, alpha_s, sigma_s = noise.alpha(t), noise.sigma(t), noise.alpha(s), noise.sigma(s)
    ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
    of_x = ratio * sigma_s / sigma_t
    return of_x, alpha_s - alpha_t * of_x, sigma_s * (1 - ratio**2).clamp(min=0).sqrt()


def rates(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g^2) at t, float64, by differentiating the schedule; not finite where alpha or sigma is 0."""
    import torch

    # The engine samples in inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), torch.enable_grad():
        u = t.clone().requires_grad_()
        sigma = noise.sigma(u)
        (f,) = torch.autograd.grad(noise.alpha(u).log().sum() + 0 * u.sum(), u)  # alpha may be constant
        (slope,) = torch.autograd.grad(sigma.square().sum(), u)
    sigma = sigma.detach()
    return f, slope - 2 * f * sigma**2
