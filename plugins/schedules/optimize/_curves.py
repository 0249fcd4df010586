"""What the methods measure of a model on its noised samples: errors by level, and differences between levels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from suite.diffusion.solver import expand
from suite.errors import ConfigError

#: Below this a chance counts as this: one sure error must not outweigh everything.
TINY = 1e-6
#: Distance in log-SNR that levels keep from the model's ends.
INSIDE = 0.05

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Denoise
    from suite.fitting.grid_fit import GridProblem


def nodes(noise: NoiseSchedule, levels: int, high: float, low: float) -> Tensor:
    """[levels] times: the prior, then even steps in log-SNR; for tokens even steps in t down to 0.

    Args:
        high, low: sigma / alpha of the first and the last level after the prior, as far as the model has them.
    """
    import torch

    if noise.discrete:
        return torch.linspace(1, 0, levels, dtype=torch.float64)
    inner = noise.time_at(torch.linspace(*ends(noise, high, low), levels - 1, dtype=torch.float64))
    return torch.cat([inner.new_ones(1), inner])


def ends(noise: NoiseSchedule, high: float, low: float) -> tuple[float, float]:
    """log-SNR at sigma / alpha = high and = low, or just inside of what the model has."""
    prior, clean = float(noise.log_snr(1.0)), float(noise.log_snr(0.0))
    return max(-2 * math.log(high), prior + INSIDE), min(-2 * math.log(low), clean - INSIDE)


def snr(noise: NoiseSchedule, times: Tensor) -> Tensor:
    """alpha^2 / sigma^2, 0 at a prior without signal."""
    return noise.log_snr(times).exp()


def check_levels(name: str, levels: int, high: float, low: float) -> None:
    """Refuse options out of range, in words that name the method."""
    if not 8 <= levels <= 4096:
        raise ConfigError(f"{name}: levels = {levels}: expected 8 to 4096")
    check_range(name, high, low)


def check_range(name: str, high: float, low: float) -> None:
    """Refuse a range of sigma / alpha that is none, in words that name the method."""
    if not 0 < low < high <= 1000:
        raise ConfigError(f"{name}: low = {low}, high = {high}: expected sigma / alpha with 0 < low < high <= 1000")


def forward_noise(x0: Tensor, times: Tensor, noise: NoiseSchedule, rng: torch.Generator) -> list[Tensor]:
    """x at each of `times` (falling) on one path of the forward process for each sample, noisy first.

    x_t = alpha x0 + sigma e, and e is a stationary Markov chain whose correlation between two times is the quotient
    of their sigma / alpha: that of Brownian motion in variance-exploding coordinates, the same in both directions.
    """
    import torch

    def normal() -> Tensor:
        return torch.randn(x0.shape, generator=rng, dtype=torch.float32).to(x0)

    ratios = torch.exp(-noise.log_snr(times) / 2)
    e, out = normal(), []
    for k, t in enumerate(times):
        if k:
            kept = ratios[k] / ratios[k - 1] if ratios[k - 1].isfinite() else ratios.new_zeros(())
            e = float(kept) * e + float((1 - kept**2).sqrt()) * normal()
        out.append(expand(noise.alpha(t), x0) * x0 + expand(noise.sigma(t), x0) * e)
    return out


def errors(problem: GridProblem, times: Tensor) -> Tensor:
    """[K] mean error at each time (falling), an element: the square error of x0, for tokens the surprise.

    The surprise of a level is the sum over masked tokens of -log p(x0 given x_t), over the length. Which tokens are
    masked is decided by one random number each, so that they are uncovered in one order as the level falls.
    """
    import torch

    total, count = torch.zeros(len(times), dtype=torch.float64), 0
    for x0, denoise, rng in problem.passes("errors", len(times)):
        measured = _surprises if problem.noise.discrete else _squares
        total += measured(problem, times, x0, denoise, rng) * len(x0)
        count += len(x0)
    return total / count


def _squares(problem: GridProblem, times: Tensor, x0: Tensor, denoise: Denoise, rng: torch.Generator) -> Tensor:
    import torch

    states = forward_noise(x0, times, problem.noise, rng)
    each = [(denoise(x, t).double() - x0.double()).square().mean() for x, t in zip(states, times, strict=True)]
    return torch.stack(each).cpu()


def _surprises(problem: GridProblem, times: Tensor, x0: Tensor, denoise: Denoise, rng: torch.Generator) -> Tensor:
    import torch

    assert problem.mask_token is not None
    order, out = torch.rand(x0.shape, generator=rng).to(x0.device), []
    for t in times:
        masked = order >= float(problem.noise.alpha(t))
        chance = denoise(x0.masked_fill(masked, problem.mask_token), t).gather(-1, x0[..., None])[..., 0]
        out.append(-(chance.double().clamp(min=TINY).log() * masked).mean())
    return torch.stack(out).cpu()


def differences(problem: GridProblem, times: Tensor) -> Tensor:
    """[K, K] mean square difference of the denoiser's answers at two times of one forward path, an element."""
    import torch

    total, count = torch.zeros(len(times), len(times), dtype=torch.float64), 0
    for x0, denoise, rng in problem.passes("differences", len(times)):
        answers = [denoise(x, t) for x, t in zip(forward_noise(x0, times, problem.noise, rng), times, strict=True)]
        for i, one in enumerate(answers):
            for j in range(i):
                total[i, j] += float((one - answers[j]).double().square().mean()) * len(x0)
        count += len(x0)
    total = total / count
    return total + total.T
