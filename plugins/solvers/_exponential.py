"""Exponential integrators: exact integrals of e^-lambda or e^lambda times a polynomial in half log-SNR.

In lam = log(alpha / sigma) the probability flow has an exact linear part (Lu 2022; Hochbruck & Ostermann 2010):

    x_s = (sigma_s / sigma_t) x + alpha_s  int_0^h e^-(h - u) x0(u)  du      data prediction
    x_s = (alpha_s / alpha_t) x - sigma_s  int_0^h e^(h - u)  eps(u) du      noise prediction

with h = lam_s - lam_t. The integrals of u^k are k! h^(k+1) phi_(k+1)(-h) and (+h).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from suite.diffusion.solver import of_times

if TYPE_CHECKING:  # plugins' modules import this one, and must load without torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule

#: Below this |z| the recursion for phi loses digits to cancellation; its series has none.
SERIES_BELOW = 1.0
SERIES_TERMS = 22


def phi(order: int, z: Tensor) -> Tensor:
    """phi_k(z) = sum_n z^n / (n + k)!, by recursion phi_(k+1) = (phi_k - 1/k!) / z from phi_0 = e^z; float64."""
    import torch

    safe = torch.where(z.abs() < SERIES_BELOW, torch.full_like(z, 2 * SERIES_BELOW), z)
    by_recursion = torch.exp(safe)
    for k in range(order):
        by_recursion = (by_recursion - 1 / math.factorial(k)) / safe
    near = z.clamp(-SERIES_BELOW, SERIES_BELOW)
    by_series = torch.zeros_like(z)
    for n in range(SERIES_TERMS - 1, -1, -1):
        by_series = by_series * near + 1 / math.factorial(n + order)
    return torch.where(z.abs() < SERIES_BELOW, by_series, by_recursion)


def interpolated(nodes: Tensor, moments: Tensor) -> Tensor:
    """Weights w of values at `nodes` whose polynomial has integrals w . values, given the integrals of r^k.

    Args:
        nodes: [..., p], distinct.
        moments: [..., p], the integral of r^k for k = 0 .. p - 1.

    Returns:
        [..., p].
    """
    import torch

    powers = torch.arange(nodes.shape[-1], dtype=nodes.dtype)
    return torch.linalg.solve(nodes[..., None, :] ** powers[:, None], moments[..., None])[..., 0]


def moments(h: Tensor, count: int, sign: int) -> Tensor:
    """Integrals over r = u / h in [0, 1] of h e^(sign h (1 - r)) r^k, k = 0 .. count - 1: [..., count]."""
    import torch

    return torch.stack([math.factorial(k) * h * phi(k + 1, sign * h) for k in range(count)], -1)


@of_times
def regular(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor]:
    """1 where log-SNR is finite at t, else 0: at alpha = 0 and at sigma = 0 no polynomial in it goes through."""
    return (noise.log_snr(t).isfinite().double(),)


def is_regular(noise: NoiseSchedule, *times: Tensor) -> bool:
    """Whether log-SNR is finite at all of the times, for all samples."""
    for t in times:
        (value,) = regular(noise, t)
        if not (value if isinstance(value, (int, float)) else bool(value.all())):
            return False
    return True


@of_times
def data_weights(noise: NoiseSchedule, t: Tensor, s: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """Exponential Adams-Bashforth on x0: weights of x, of x0 at t, and of x0 at each time of `past`."""
    nodes, h = _nodes(noise, t, s, past)
    weights = noise.alpha(s)[..., None] * interpolated(nodes, moments(h, nodes.shape[-1], -1))
    return noise.sigma(s) / noise.sigma(t), *weights.unbind(-1)


@of_times
def noise_weights(noise: NoiseSchedule, t: Tensor, s: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """The same on epsilon: weights of x, of epsilon at t, and of epsilon at each time of `past`."""
    nodes, h = _nodes(noise, t, s, past)
    weights = -noise.sigma(s)[..., None] * interpolated(nodes, moments(h, nodes.shape[-1], 1))
    return noise.alpha(s) / noise.alpha(t), *weights.unbind(-1)


def _nodes(noise: NoiseSchedule, t: Tensor, s: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Half log-SNR of t and the past, from that of t and in units of the step: [..., 1 + past]; and the step."""
    import torch

    lam_t = noise.log_snr(t) / 2
    h = noise.log_snr(s) / 2 - lam_t
    return torch.stack([(noise.log_snr(u) / 2 - lam_t) / h for u in (t, *past)], -1), h


@of_times
def epsilon_weights(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of x and x0 in epsilon = (x - alpha x0) / sigma; needs sigma > 0."""
    return 1 / noise.sigma(t), -noise.alpha(t) / noise.sigma(t)


@of_times
def noise_step_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """DDIM's transfer with an epsilon that is not that of x: weights of x and epsilon; needs alpha_t > 0."""
    of_x = noise.alpha(s) / noise.alpha(t)
    return of_x, noise.sigma(s) - noise.sigma(t) * of_x


@of_times
def _between(noise: NoiseSchedule, t: Tensor, s: Tensor, fraction: Tensor | float) -> tuple[Tensor]:
    return (noise.time_at(noise.log_snr(t) * (1 - fraction) + noise.log_snr(s) * fraction),)


def between(noise: NoiseSchedule, t: Tensor, s: Tensor, fraction: float) -> Tensor:
    """The time whose half log-SNR lies at `fraction` of the way from t to s."""
    (value,) = _between(noise, t, s, fraction)
    return t.new_tensor(value) if isinstance(value, int | float) else value


def irregular_ends(noise: NoiseSchedule) -> int:
    """How many of the two ends, t = 1 and t = 0, have an infinite log-SNR."""
    import torch

    return sum(not is_regular(noise, torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0))


def stopping_evaluations(noise: NoiseSchedule, order: int, steps: int) -> int:
    """Of a method that evaluates `order` times a step, and once in a step from alpha = 0 or to sigma = 0."""
    irregular = min(steps, irregular_ends(noise))
    return order * (steps - irregular) + irregular
