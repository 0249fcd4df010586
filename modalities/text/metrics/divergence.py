"""A divergence frontier like MAUVE (Pillutla 2021): are two sets of texts made of the same kinds, in equal shares?

Features of both sets are quantised together by k-means; P and Q are the shares of the clusters. For every mixture
R = w P + (1 - w) Q the point (exp(-c KL(Q|R)), exp(-c KL(P|R))) is on a curve, and MAUVE is the area under it: 1 for
equal shares, towards 0 for disjoint ones. The original's features are GPT-2's; these are MiniLM sentence vectors, so
numbers are comparable with each other and not with published ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.shared.distances import fit_projection

SCALING = 5.0
"""c: as in the original."""
AXES = 50
ROUNDS = 25


def mauve(texts: Tensor, real: Tensor, clusters: int | None = None, seed: int = 0) -> float:
    """MAUVE in [0, 1] of text features [N, D] against real ones [M, D]; equal sizes are taken from the larger set.

    `clusters` default to a tenth of the smaller set, at least 2. Deterministic for a seed.
    """
    if min(len(texts), len(real)) < 4:
        raise ConfigError(f"mauve: got {len(texts)} and {len(real)} texts; expected 4 or more of each")
    count = min(len(texts), len(real))
    rng = torch.Generator().manual_seed(seed)
    first, second = (t[torch.randperm(len(t), generator=rng)[:count]].double() for t in (texts, real))
    both = torch.cat([first, second])
    coordinates = fit_projection(both, AXES)(both)
    label = kmeans(coordinates, clusters or max(2, count // 10), rng)
    size = int(label.max()) + 1
    p = torch.bincount(label[:count], minlength=size) / count
    q = torch.bincount(label[count:], minlength=size) / count
    return area(p.double(), q.double())


def area(p: Tensor, q: Tensor, points: int = 100) -> float:
    """Area under the divergence curve of two distributions [K], float64."""
    weights = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    curve = [(0.0, 1.0), (1.0, 0.0)]
    for w in weights:
        r = w * p + (1 - w) * q
        curve.append((float(torch.exp(-SCALING * _kl(q, r))), float(torch.exp(-SCALING * _kl(p, r)))))
    x, y = torch.tensor(sorted(curve), dtype=torch.float64).T
    lower = float(torch.trapezoid(y, x))
    y_order = torch.tensor(sorted((b, a) for a, b in curve), dtype=torch.float64).T
    # The mean over both orders: the area does not depend on which set is called P.
    return 0.5 * (lower + float(torch.trapezoid(y_order[1], y_order[0])))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum()


def kmeans(points: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """Cluster of each point [N]; k-means++ start (Arthur 2007), `ROUNDS` rounds of Lloyd's."""
    centres = points[torch.randint(len(points), (1,), generator=rng)]
    while len(centres) < min(clusters, len(points)):
        nearest = torch.cdist(points, centres).amin(1).square()
        if nearest.sum() == 0:  # fewer different points than clusters
            break
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=rng)]])
    label = torch.cdist(points, centres).argmin(1)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        counts = torch.bincount(label, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        label = torch.cdist(points, centres).argmin(1)
    return label
