"""Fréchet and kernel distance against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.shared.distances import (
    fit_projection,
    frechet_distance,
    frechet_from_features,
    kernel_distance,
    moments,
)


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    root = normal(size, size, seed)
    return root @ root.T / size


def test_frechet_of_equal_gaussians_is_zero() -> None:
    mean, cov = normal(1, 64, 0)[0], covariance(64, 1)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)


def test_frechet_of_equal_sets_is_zero_where_the_covariance_has_no_full_rank() -> None:
    features = normal(20, 300, 0)
    assert frechet_from_features(features, features) == pytest.approx(0, abs=1e-4)


def test_frechet_of_a_shift_is_its_squared_length() -> None:
    mean, shift, cov = normal(1, 8, 0)[0], normal(1, 8, 1)[0], covariance(8, 2)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_frechet_of_a_shifted_set_is_the_squared_shift() -> None:
    features = normal(500, 8, 0)
    assert frechet_from_features(features + 0.5, features) == pytest.approx(8 * 0.25, rel=1e-9)


def test_frechet_of_commuting_covariances_compares_standard_deviations() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    rotation = torch.linalg.qr(normal(3, 3, 0)).Q
    zero = torch.zeros(3)
    got = frechet_distance(
        zero, rotation @ a.diag().double() @ rotation.T, zero, rotation @ b.diag().double() @ rotation.T
    )
    assert got == pytest.approx(1 + 1 + 9, rel=1e-9)


def test_frechet_of_general_covariances_matches_the_matrix_square_root() -> None:
    a, b, zero = covariance(6, 0), covariance(6, 1), torch.zeros(6)
    # a @ b is similar to a symmetric matrix, so its eigenvalues are real and not negative.
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    assert frechet_distance(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace() - 2 * cross), rel=1e-8)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a), rel=1e-8)


def test_frechet_on_all_axes_equals_frechet_without_axes() -> None:
    features, reference = normal(200, 5, 0) * 2, normal(300, 5, 1)
    plain = frechet_from_features(features, reference)
    assert frechet_from_features(features, reference, pca=5) == pytest.approx(plain, rel=1e-9)
    assert frechet_from_features(features, reference, pca=99) == pytest.approx(plain, rel=1e-9)
    assert 0 < frechet_from_features(features, reference, pca=2) < plain


def test_the_axes_come_from_the_reference() -> None:
    reference = normal(400, 3, 0) * torch.tensor([5.0, 1.0, 0.1])
    axes = fit_projection(reference, 1)
    assert abs(float(axes.basis[0, 0])) == pytest.approx(1, abs=1e-2)
    assert torch.allclose(axes(reference).mean(0), torch.zeros(1, dtype=torch.float64), atol=1e-9)
    far_off = reference + torch.tensor([0.0, 0.0, 7.0])  # along an axis that is not kept
    assert frechet_from_features(far_off, reference, pca=1) < 1e-3


def test_moments_are_those_of_the_unbiased_estimator() -> None:
    features = normal(50, 4, 0)
    mean, cov = moments(features.float())
    assert mean.dtype == torch.float64
    assert torch.allclose(mean, features.mean(0), atol=1e-6)
    assert torch.allclose(cov, torch.cov(features.T), atol=1e-5)


def brute_force(x: Tensor, y: Tensor) -> float:
    """The U-statistic of the squared MMD, term by term."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return within_x + within_y - 2 * between


@pytest.mark.parametrize(("rows", "others"), [(4, 4), (7, 12)])
def test_kernel_distance_matches_brute_force(rows: int, others: int) -> None:
    x, y = normal(rows, 3, 0), normal(others, 3, 1) + 0.5
    assert kernel_distance(x, y).value == pytest.approx(brute_force(x, y), rel=1e-9)


def test_kernel_distance_of_two_halves_is_near_zero() -> None:
    for seed in range(5):
        x, y = normal(1000, 16, seed).split(500)
        got = kernel_distance(x, y)
        assert abs(got.value) < 4 * got.stderr


def test_kernel_distance_is_unbiased_and_its_standard_error_covers_the_spread() -> None:
    found = [kernel_distance(*normal(120, 4, seed).split(60), subsets=30) for seed in range(200)]
    values = torch.tensor([f.value for f in found])
    spread = float(values.std())
    assert abs(float(values.mean())) < 4 * spread / 200**0.5
    stated = sum(f.stderr for f in found) / len(found)
    # Under equality the stated error errs on the large side, by about sqrt(3).
    assert spread < stated < 2.5 * spread


def test_the_standard_error_is_right_for_distributions_that_differ() -> None:
    found = [kernel_distance(normal(80, 4, s), normal(80, 4, 999 + s) + 1, subsets=30) for s in range(200)]
    spread = float(torch.tensor([f.value for f in found]).std())
    stated = sum(f.stderr for f in found) / len(found)
    assert stated == pytest.approx(spread, rel=0.3)


def test_kernel_distance_tells_a_shift() -> None:
    got = kernel_distance(normal(300, 8, 0) + 1, normal(300, 8, 1))
    assert got.value > 10 * got.stderr


def test_kernel_distance_thins_large_sets_and_repeats_itself() -> None:
    x, y = normal(500, 3, 0), normal(300, 3, 1)
    assert kernel_distance(x, y, limit=100) == kernel_distance(x, y, limit=100)
    assert kernel_distance(x, y, limit=100) != kernel_distance(x, y, limit=100, seed=1)


@pytest.mark.parametrize(
    ("features", "reference", "expected"),
    [
        (torch.zeros(5), torch.zeros(5, 3), "expected \\[N, D\\]"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "or more"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "expected the same"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(features: Tensor, reference: Tensor, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        frechet_from_features(features, reference)
    with pytest.raises(ConfigError, match=expected):
        kernel_distance(features, reference)


def test_moments_of_other_shapes_and_bad_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2))
    with pytest.raises(ConfigError, match="1 or more axes"):
        fit_projection(torch.randn(4, 3), 0)
    with pytest.raises(ConfigError, match="2 or more"):
        kernel_distance(torch.randn(4, 3), torch.randn(4, 3), subsets=1)
