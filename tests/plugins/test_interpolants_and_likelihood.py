"""Methods published only as trained models, on Gaussian toys where what they claim is exact.

Stochastic interpolants (Albergo 2023, 2303.08797), the likelihood of the probability flow (i-DODE, Zheng 2023,
2305.03935) and the learnable forward drift of DiffFlow (Zhang & Chen 2021, 2110.07579). Nothing here is trained: the
networks' places are taken by the exact answers of Gaussian data, so what is tested is the methods' mathematics.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import Cosine, Flow, NoiseSchedule, TrigFlow, VPLinear
from suite.diffusion.prediction import Prediction
from suite.plugins.solvers._stochastic import rates
from suite.testing import Gaussian
from suite.testing.oracles import slope

DATA, START = Gaussian(0.7, 0.25), torch.tensor([[-1.3], [0.4], [1.9]], dtype=torch.float64)
NOISES = [VPLinear(), Cosine(), Flow(), TrigFlow()]


def at(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---- stochastic interpolants -------------------------------------------------------------------
# x_u = (1 - u) x0 + u x1 + gamma(u) z between two Gaussians, gamma^2 = c u (1 - u); the three are independent.

FIRST, LAST = (0.7, 0.25), (-0.4, 1.5)


def law(u: float, c: float) -> tuple[float, float]:
    """Mean and variance of x_u."""
    mean = (1 - u) * FIRST[0] + u * LAST[0]
    return mean, (1 - u) ** 2 * FIRST[1] + u**2 * LAST[1] + c * u * (1 - u)


def velocity(x: Tensor, u: float, c: float) -> Tensor:
    """E[dx_u / du given x_u = x], by the regression of one Gaussian on another."""
    mean, variance = law(u, c)
    # Cov(x1 - x0 + gamma' z, x_u), gamma gamma' = c (1 - 2u) / 2.
    covariance = u * LAST[1] - (1 - u) * FIRST[1] + c * (1 - 2 * u) / 2
    return LAST[0] - FIRST[0] + covariance / variance * (x - mean)


def score(x: Tensor, u: float, c: float) -> Tensor:
    mean, variance = law(u, c)
    return -(x - mean) / variance


@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
def test_without_its_noise_an_interpolant_is_rectified_flow(u: float) -> None:
    # From data at u = 0 to standard normal noise at u = 1 it is our flow family, and its velocity the prediction.
    noise, target, (_, variance) = Flow(), DATA, (0.0, (1 - u) ** 2 * 0.25 + u**2)
    mean = (1 - u) * 0.7
    plain = -0.7 + (u - (1 - u) * 0.25) / variance * (START - mean)
    if u > 0:
        torch.testing.assert_close(plain, target.output(noise, Prediction.FLOW)(START, at(u)), rtol=0, atol=1e-12)
    got = tuple(map(float, target.marginal(noise, u)))
    assert got == pytest.approx((mean, variance), rel=1e-12)


@pytest.mark.parametrize("c", [0.0, 0.5])
@pytest.mark.parametrize("diffusion", [0.0, 0.4])
def test_the_ode_and_the_sde_of_an_interpolant_have_its_marginals(c: float, diffusion: float) -> None:
    # dx = (b + e s) du + sqrt(2 e) dw: mean and variance follow linear equations, by Euler with order 1.
    steps, errors = (200, 400, 800), []
    for count in steps:
        mean, variance, h = at(FIRST[0]), at(FIRST[1]), 1 / count
        for k in range(count):
            u = k * h
            ends = [velocity(v, u, c) + diffusion * score(v, u, c) for v in (mean, mean + 1)]
            gain = ends[1] - ends[0]
            mean = mean + h * ends[0]
            variance = variance * (1 + h * gain) ** 2 + 2 * diffusion * h
        errors.append(abs(float(mean) - LAST[0]) + abs(float(variance) - LAST[1]))
    assert errors[-1] < 0.02
    assert slope(steps, errors) == pytest.approx(1, abs=0.1)


def test_an_sde_with_the_flows_drift_alone_has_other_marginals() -> None:
    # What the score's part of the drift is for: without it the noise is not taken away again.
    mean, variance, count = at(FIRST[0]), at(FIRST[1]), 400
    for k in range(count):
        u = k / count
        ends = [velocity(v, u, 0.5) for v in (mean, mean + 1)]
        variance = variance * (1 + (ends[1] - ends[0]) / count) ** 2 + 2 * 0.4 / count
        mean = mean + ends[0] / count
    assert float(variance) > LAST[1] + 0.2


# ---- likelihood of the probability flow --------------------------------------------------------


def flow_drift(noise: NoiseSchedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """f x - g^2 score / 2 and its exact divergence."""
    f, g2 = rates(noise, t)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        drift = f * x - g2 / 2 * DATA.score(noise)(x, t)
        (divergence,) = torch.autograd.grad(drift.sum(), x)
    return drift.detach(), divergence


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_the_likelihood_by_the_flows_divergence_is_the_datas_own(noise: NoiseSchedule) -> None:
    # log p_0(x) = log p_1(x(1)) + int div dt, by RK4 in minus log-SNR (i-DODE's timing), between interior times.
    low, high, count = 6.0, -6.0, 200
    times = noise.time_at(torch.linspace(low, high, 2 * count + 1, dtype=torch.float64))
    pace = (high - low) / count
    x, gathered = START * 0.5 + 0.5, torch.zeros_like(START)
    first = x

    def by_log_snr(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g2 = rates(noise, t)
        del f
        drift, divergence = flow_drift(noise, x, t)
        per_time = -g2 / noise.sigma(t) ** 2  # d log-SNR / dt
        return drift / per_time, divergence / per_time

    for k in range(0, 2 * count, 2):
        a = by_log_snr(x, times[k])
        b = by_log_snr(x + pace / 2 * a[0], times[k + 1])
        c = by_log_snr(x + pace / 2 * b[0], times[k + 1])
        d = by_log_snr(x + pace * c[0], times[k + 2])
        x, gathered = (
            v + pace / 6 * (p + 2 * q + 2 * r + w) for v, p, q, r, w in zip((x, gathered), a, b, c, d, strict=True)
        )

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = DATA.marginal(noise, t)
        return -((x - mean) ** 2) / (2 * variance) - (2 * math.pi * variance).log() / 2

    got = log_density(x, times[-1]) + gathered
    torch.testing.assert_close(got, log_density(first, times[0]), rtol=0, atol=1e-6)


# ---- DiffFlow ----------------------------------------------------------------------------------


def kl(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """Of two Gaussians."""
    away, inverse = other_mean - mean, torch.linalg.inv(other_cov)
    terms = (inverse @ cov).trace() - len(mean) + away @ inverse @ away + other_cov.logdet() - cov.logdet()
    return float(terms / 2)


def test_diffflows_path_divergence_is_zero_for_the_matched_backward_process() -> None:
    # Forward x' = (1 + h f) x + sqrt(h) g z; back by x = (x' + h g^2 score) / (1 + h f) and its spread (Tweedie). The
    # KL of the two paths is what DiffFlow trains f and the score by: the sum, over steps, of that of neighbours.
    noise, count = VPLinear(), 50
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)

    def path_divergence(score_factor: float) -> float:
        mean, variance, total = at(0.7), at(0.25), 0.0
        for t, s in itertools.pairwise(times):
            f, g2 = rates(noise, t.clamp(min=1e-4))
            keep, fresh = 1 + (s - t) * f, (s - t) * g2
            after, spread_after = keep * mean, keep**2 * variance + fresh
            forth = torch.stack([variance, keep * variance, keep * variance, spread_after]).reshape(2, 2)
            gain = (1 - score_factor * fresh / spread_after) / keep
            spread = fresh / keep**2 * (1 - fresh / spread_after)
            here = gain * after + (1 / keep - gain) * after  # the score is 0 at the mean
            back = torch.stack(
                [gain**2 * spread_after + spread, gain * spread_after, gain * spread_after, spread_after]
            )
            total += kl(torch.stack([mean, after]), forth, torch.stack([here, after]), back.reshape(2, 2))
            mean, variance = after, spread_after
        return total

    assert abs(path_divergence(1.0)) < 1e-10
    assert path_divergence(0.9) > 1e-3 and path_divergence(0.5) > path_divergence(0.9)
    # And f held at the VP drift is the score SDE: the chain's law is its marginal, to the order of Euler's step.
    gaps = []
    for steps in (200, 400, 800):
        mean, variance, h = at(0.7), at(0.25), 1 / steps
        for k in range(steps):
            f, g2 = rates(noise, at(max(k * h, 1e-6)))
            mean, variance = mean * (1 + h * f), variance * (1 + h * f) ** 2 + h * g2
        exact = DATA.marginal(noise, 1.0)
        gaps.append(abs(float(mean - exact[0])) + abs(float(variance - exact[1])))
    assert slope((200, 400, 800), gaps) == pytest.approx(1, abs=0.15)
