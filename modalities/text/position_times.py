"""Noise that differs between the positions of a text: by importance of the words, or by how hard a place is.

Both give every position a time of its own for each time of the run: [steps + 1, positions], which schedules, solvers
and denoisers of the suite take as they are. So a model needs no noise schedule of another kind for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suite.errors import ConfigError

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule


#: A time of a word below this is rounding of 0: its turn has not come.
ROUNDING = 1e-9


def importance(texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Importance of each word of each text: its share of the text's tf-idf plus its share of the entropy.

    Masked-Diffuse LM (Chen 2023, 2304.04746, section 3.2). The entropy of a word is -p log p with p its frequency in
    all texts. Shares of one text sum to 1, so importances sum to 2.
    """
    count = Counter(word for text in texts for word in text)
    within = Counter(word for text in texts for word in set(text))
    total = sum(count.values())
    out = []
    for text in texts:
        here = Counter(text)
        weight = torch.tensor([here[w] / len(text) * math.log((1 + len(texts)) / within[w]) for w in text]).double()
        surprise = torch.tensor([-count[w] / total * math.log(count[w] / total) for w in text]).double()
        out.append(_share(weight) + _share(surprise))
    return out


def _share(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / max(1, len(values)))


def buckets(important: Tensor, count: int) -> Tensor:
    """[L] bucket of each word: 0 the most important, count - 1 the least; sizes differ by at most one.

    Raises:
        ConfigError: more buckets than words, or none.
    """
    if not 1 <= count <= len(important):
        raise ConfigError(f"{count} buckets for {len(important)} words: expected 1 to {len(important)}")
    rank = important.argsort(descending=True, stable=True).argsort()
    return rank * count // len(important)


def soft_mask_times(times: Tensor, bucket: Tensor, count: int) -> Tensor:
    """[steps + 1, L] times: the most important words are noised first, and so come back last.

    Bucket b begins to be noised at time b / count and reaches 1 with all others: (t - b/count) / (1 - b/count), 0
    before. Easy words are there first when sampling.

    Args:
        times: [steps + 1] of the run. bucket: [L], as `buckets` gives it.
    """
    begin = bucket.double() / count
    own = ((times.double()[:, None] - begin) / (1 - begin)).clamp(0, 1)
    return own.where(own > ROUNDING, 0.0)


def noised(x0: Tensor, epsilon: Tensor, noise: NoiseSchedule, t: Tensor) -> Tensor:
    """x_t [B, L, D] at times t [L] or [B, L]: a position at time 0 stays as it is, bit for bit.

    That holds for schedules too that begin with noise (sqrt): a word whose turn has not come has none.
    """
    alpha, sigma = (c(t)[..., None].to(x0) for c in (noise.alpha, noise.sigma))
    return torch.where((t > 0)[..., None].to(x0.device), alpha * x0 + sigma * epsilon, x0)


def update_kept(kept: Tensor, losses: Tensor, fixed: int = 1) -> Tensor:
    """SeqDiffuSeq's refresh (Yuan 2024, 2212.10325, section 3.3): alpha_bar for which the loss is linear in time.

    The losses of a position are made to rise, then each level of loss, in even steps, is given the alpha_bar at which
    it was measured, linearly between measurements. A loss that is linear already changes nothing.

    Args:
        kept: [K, L] alpha_bar at even times from 0 to 1, falling. losses: [K, L], measured there.
        fixed: positions in front that keep theirs (the start of the sentence, which is always known).

    Returns:
        [K, L], falling.
    """
    if kept.shape != losses.shape or kept.shape[0] < 2:
        raise ConfigError(f"update: expected two tables [K, L] with K > 1, got {[*kept.shape]} and {[*losses.shape]}")
    rising = losses.double().cummax(0).values
    # Equal losses leave a step of the interpolation without length; a hair apart, its later end decides.
    rising = rising + torch.arange(len(rising), dtype=torch.float64)[:, None] * 1e-12
    out = kept.double().clone()
    part = torch.linspace(0, 1, len(kept), dtype=torch.float64)
    for k in range(fixed, kept.shape[1]):
        level = rising[0, k] + part * (rising[-1, k] - rising[0, k])
        right = torch.searchsorted(rising[:, k].contiguous(), level).clamp(1, len(kept) - 1)
        left = right - 1
        share = (level - rising[left, k]) / (rising[right, k] - rising[left, k])
        out[:, k] = kept[left, k] + share.clamp(0, 1) * (kept[right, k] - kept[left, k])
    return out


def adaptive_times(kept: Tensor, noise: NoiseSchedule) -> Tensor:
    """[steps + 1, L] times, falling, at which the model's own schedule keeps what the table says.

    Args:
        kept: [steps + 1, L] alpha_bar at even times from 0 to 1, alpha_bar = alpha^2 / (alpha^2 + sigma^2).
    """
    times = noise.time_at(torch.logit(kept.double().clamp(1e-12, 1 - 1e-12))).flip(0)
    times[0], times[-1] = 1.0, 0.0
    return times


class LossTable:
    """Mean loss by time and position, gathered over a training run and emptied at each refresh."""

    def __init__(self, bins: int, positions: int) -> None:
        self.total = torch.zeros(bins, positions, dtype=torch.float64)
        self.count = torch.zeros(bins, positions, dtype=torch.float64)

    def add(self, t: Tensor, losses: Tensor, mask: Tensor) -> None:
        """Losses [B, L] at times t [B] in [0, 1], where mask [B, L] is 1."""
        row = (t.double().cpu() * (len(self.total) - 1)).round().long()
        self.total.index_add_(0, row, (losses * mask).double().cpu())
        self.count.index_add_(0, row, mask.double().cpu())

    def mean(self) -> Tensor:
        """[bins, L].

        Raises:
            ConfigError: some place was never seen; refresh less often, or with fewer bins.
        """
        if (missing := int((self.count == 0).sum())) > 0:
            raise ConfigError(f"{missing} of {self.count.numel()} bins of the loss table are empty: refresh later")
        return self.total / self.count
