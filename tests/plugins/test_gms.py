"""The Gaussian mixture solver (Guo 2023, 2311.00941), on a toy: a mixture in one dimension, densities on a grid.

The method needs a network with heads for E[eps^2] and E[eps^3], and no such network ships; so these are tests of its
mathematics, with the exact conditional moments in place of the heads. With them the reverse kernel q(x_s | x_t), which
is Gaussian only for small steps, is matched in three moments by a mixture of two components instead of in two by one.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

WEIGHTS, MEANS, SPREAD = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.2, 0.8]).double(), 0.02
GRID = torch.linspace(-4, 4, 801, dtype=torch.float64)
CELL = float(GRID[1] - GRID[0])
LARGEST = 0.98
"""Share of the variance that the distance of the two means may take; what is left is each component's own."""


def fit(variance: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two components around a mean of 0 with this variance and third central moment.

    With means a and -b, weights b/(a+b) and a/(a+b) and a common variance v, the second moment is v + ab and the third
    ab(a-b). ab = |third|^(2/3) makes a-b its cube root, so that both components go to the mean as the skewness does; it
    is capped so that v stays positive. Returns (weight of the first, a, b, v).
    """
    product = torch.minimum(third.abs() ** (2 / 3), LARGEST * variance)
    difference = torch.where(product > 0, third / product.clamp(min=1e-300), torch.zeros_like(third))
    total = (difference**2 + 4 * product).sqrt()
    a, b = (total + difference) / 2, (total - difference) / 2
    weight = torch.where(total > 0, b / total.clamp(min=1e-300), torch.full_like(total, 0.5))
    return weight, a, b, variance - product


def clean_moments(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and third central moment of x0 given x_t = x: what the three heads would answer."""
    of_x = alpha**2 * SPREAD + sigma**2
    density = WEIGHTS * torch.exp(-((x[:, None] - alpha * MEANS) ** 2) / (2 * of_x))
    share = density / density.sum(1, keepdim=True).clamp(min=1e-300)
    means = MEANS + alpha * SPREAD / of_x * (x[:, None] - alpha * MEANS)
    own, mean = SPREAD * sigma**2 / of_x, (share * means).sum(1)
    apart = means - mean[:, None]
    return mean, (share * (apart**2 + own)).sum(1), (share * (apart**3 + 3 * apart * own)).sum(1)


def normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()


def step(density: Tensor, t: float, s: float, mixture: bool) -> Tensor:
    """The density at s from that at t, through the matched kernel of each x_t on the grid."""
    alpha_t, sigma_t, alpha_s, sigma_s = math.cos(t), math.sin(t), math.cos(s), math.sin(s)
    between = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    of_x, of_x0 = alpha_t / alpha_s * sigma_s**2 / sigma_t**2, alpha_s * between / sigma_t**2
    mean, variance, third = clean_moments(GRID, alpha_t, sigma_t)
    centre = of_x * GRID + of_x0 * mean
    variance = of_x0**2 * variance + sigma_s**2 * between / sigma_t**2
    third = of_x0**3 * third if mixture else torch.zeros_like(third)
    weight, a, b, own = (v[:, None] for v in fit(variance, third))
    # No narrower than two cells, or the grid could not hold it.
    own = own.clamp(min=(2 * CELL) ** 2)
    kernel = weight * normal(GRID, centre[:, None] + a, own) + (1 - weight) * normal(GRID, centre[:, None] - b, own)
    return (density * CELL) @ kernel


def divergence(steps: int, mixture: bool) -> float:
    """KL from the data to what `steps` steps make of a standard normal."""
    density = normal(GRID, torch.zeros(()).double(), torch.ones(()).double())
    times = torch.linspace(1.5, 0.0, steps + 1).tolist()
    for t, s in itertools.pairwise(times):
        density = step(density, t, s, mixture)
    data = (WEIGHTS * normal(GRID[:, None], MEANS, torch.tensor(SPREAD, dtype=torch.float64))).sum(1)
    density = density / (density.sum() * CELL)
    return float((data * (data.clamp(min=1e-300) / density.clamp(min=1e-300)).log()).sum() * CELL)


def test_the_mixture_has_the_three_moments():
    for time in (1.4, 1.0, 0.6, 0.3):
        _, variance, third = clean_moments(GRID[200:600], math.cos(time), math.sin(time))
        weight, a, b, own = fit(variance, third)
        torch.testing.assert_close(weight * a - (1 - weight) * b, torch.zeros_like(a), atol=1e-12, rtol=0)
        torch.testing.assert_close(weight * a**2 + (1 - weight) * b**2 + own, variance, atol=1e-12, rtol=0)
        skew = weight * (a**3 + 3 * a * own) - (1 - weight) * (b**3 + 3 * b * own)
        torch.testing.assert_close(skew, third, atol=1e-6, rtol=0)
        assert (own > 0).all() and (weight >= 0).all() and (weight <= 1).all()


def test_conditional_moments_are_those_of_the_posterior_density():
    time, x = 0.9, torch.tensor([-0.8, 0.1, 1.0]).double()
    alpha, sigma = math.cos(time), math.sin(time)
    prior = (WEIGHTS * normal(GRID[:, None], MEANS, torch.tensor(SPREAD, dtype=torch.float64))).sum(1)
    posterior = prior * normal(x[:, None], alpha * GRID, torch.tensor(sigma**2, dtype=torch.float64))
    posterior = posterior / posterior.sum(1, keepdim=True)
    mean = (posterior * GRID).sum(1)
    moments = [(posterior * (GRID - mean[:, None]) ** k).sum(1) for k in (2, 3)]
    for found, expected in zip(clean_moments(x, alpha, sigma), (mean, *moments), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_gaussian_kernel_needs_one_component():
    variance = torch.tensor([0.01, 1.0, 4.0]).double()
    _, a, b, own = fit(variance, torch.zeros_like(variance))
    assert (a == 0).all() and (b == 0).all() and torch.equal(own, variance)


@pytest.mark.parametrize("steps", [2, 3, 4, 6, 8])
def test_three_moments_beat_two_at_few_steps(steps: int):
    assert divergence(steps, mixture=True) < 0.8 * divergence(steps, mixture=False)
