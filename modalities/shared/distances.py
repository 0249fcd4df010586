"""Distances between two sets of features, for every modality: Fréchet (FID and its kin) and kernel (KID and its kin).

All sums run in float64. Features are [N, D] of any float type; values are dimensionless, 0 = same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal axes of a reference set: `mean` [D]; `basis` [D, K], orthonormal columns, largest variance first."""

    mean: Tensor
    basis: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[N, D] -> coordinates [N, K] float64."""
        return (features.double() - self.mean.double()) @ self.basis.double()


@dataclass(frozen=True)
class Estimate:
    """A number and the standard error of its sampling."""

    value: float
    stderr: float


def fit_projection(reference: Tensor, width: int) -> Projection:
    """PCA of `reference` [N, D]: the first `width` axes, fewer when N - 1 or D is smaller."""
    _check("reference", reference)
    if width < 1:
        raise ConfigError(f"pca is {width}, expected 1 or more axes")
    x = reference.double()
    mean = x.mean(0)
    rank = min(width, x.shape[0] - 1, x.shape[1])
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh
    return Projection(mean, axes[:rank].T.contiguous())


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], N >= 2, in float64."""
    _check("features", features)
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (x.shape[0] - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982; as FID: Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1^1/2 cov2 cov1^1/2)^1/2). That product is symmetric, so its square root
    is real and comes from eigenvalues; the usual sqrtm(cov1 cov2) turns complex when a covariance is rank-deficient.
    mu [D], cov [D, D]. Raises ConfigError when the shapes differ.
    """
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (*mu1.shape, *mu1.shape):
        raise ConfigError(
            f"Means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(cov1.shape)}, {tuple(cov2.shape)} "
            "do not fit: expected [D], [D], [D, D], [D, D]"
        )
    a, b = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (mu1.double() - mu2.double()).square().sum()
    # Rounding may leave a tiny negative number for equal sets.
    return max(0.0, float(shift + a.trace() + b.trace() - 2 * cross))


def frechet_from_features(features: Tensor, reference: Tensor, pca: int | None = None) -> float:
    """Fréchet distance of features [N, D] from `reference` [M, D], on the reference's first `pca` axes if given.

    The axes come from the reference alone, so that two generators are compared in the same space. The estimate is
    biased upwards, by about K^2 / N for K axes and unit variances: compare equal N only.
    """
    _check_pair(features, reference)
    if pca is not None:
        axes = fit_projection(reference, pca)
        features, reference = axes(features), axes(reference)
    return frechet_distance(*moments(features), *moments(reference))


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int = 100, limit: int = 4096, seed: int = 0
) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (KID: Bińkowski et al. 2018, arXiv 1801.01401, eq. 4).

    The value uses all rows; it is unbiased, so it may be negative. The standard error is the spread of the same
    statistic over `subsets` random halves of both sets, drawn without replacement: n/(n/2) - 1 = 1 makes the
    half-sample variance that of the whole (Shao & Wu 1989), and where the two distributions are equal it errs on the
    large side, by about sqrt(3). Sets above `limit` rows are thinned to it at random. N, M >= 4.
    """
    _check_pair(features, reference, rows=4)
    if subsets < 2:
        raise ConfigError(f"subsets is {subsets}, expected 2 or more: one subset has no spread")
    rng = torch.Generator().manual_seed(seed)
    x, y = (_thin(f, limit, rng).double().cpu() for f in (features, reference))
    kernels = (_kernel(x, x), _kernel(y, y), _kernel(x, y))
    whole = _mmd(*kernels, x.new_ones(1, len(x)), y.new_ones(1, len(y)))
    halves = _mmd(*kernels, _halves(len(x), subsets, rng), _halves(len(y), subsets, rng))
    return Estimate(float(whole[0]), float(halves.std()))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd(xx: Tensor, yy: Tensor, xy: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The U-statistic on the rows that `u` [S, N] and `v` [S, M] (0 or 1) choose -> [S]."""
    n, m = u.sum(1), v.sum(1)
    within_x = ((u @ xx) * u).sum(1) - u @ xx.diagonal()
    within_y = ((v @ yy) * v).sum(1) - v @ yy.diagonal()
    between = ((u @ xy) * v).sum(1)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)


def _halves(rows: int, subsets: int, rng: torch.Generator) -> Tensor:
    order = torch.rand(subsets, rows, generator=rng).argsort(1)
    return (order < rows // 2).double()


def _thin(features: Tensor, limit: int, rng: torch.Generator) -> Tensor:
    if len(features) <= limit:
        return features
    return features[torch.randperm(len(features), generator=rng)[:limit].to(features.device)]


def _check(what: str, features: Tensor, rows: int = 2) -> None:
    if features.ndim != 2 or features.shape[0] < rows:
        raise ConfigError(f"{what} has shape {tuple(features.shape)}, expected [N, D] with N of {rows} or more")
    if not torch.isfinite(features).all():
        raise ConfigError(f"{what} holds a value that is not finite")


def _check_pair(features: Tensor, reference: Tensor, rows: int = 2) -> None:
    _check("features", features, rows)
    _check("reference", reference, rows)
    if features.shape[1] != reference.shape[1]:
        raise ConfigError(
            f"features have {features.shape[1]} columns and reference has {reference.shape[1]}: expected the same"
        )
