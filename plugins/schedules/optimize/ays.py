"""Align Your Steps: the grid whose linearised sampler is nearest to the exact one in Kullback-Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.fitting.grid_fit import Fitted, GridMethod, GridProblem
from suite.plugins.schedules.optimize._curves import check_levels, differences, nodes, snr
from suite.plugins.schedules.optimize._path import best_path

if TYPE_CHECKING:
    from torch import Tensor


def klub_costs(away: Tensor, ratio: Tensor) -> Tensor:
    """[K, K] KLUB of the step from level i to level j > i, given what the denoiser's answers differ by.

    (1/2) int E |D(x_t, t) - D(x_i, i)|^2 d SNR over the step, which in variance-exploding coordinates is the paper's
    int E |...|^2 / sigma^3 d sigma. By the trapezoid rule in SNR, where the prior is an ordinary point.

    Args:
        away: [K, K] mean square differences E |D(x_i) - D(x_j)|^2, levels from noisy to clean.
        ratio: [K] SNR of the levels, rising.
    """
    import torch

    pieces = (away[:, 1:] + away[:, :-1]) / 2 * ratio.diff() / 2
    upto = torch.cat([pieces.new_zeros(len(ratio), 1), pieces.cumsum(1)], 1)
    return upto - upto.diagonal()[:, None]


@dataclass(frozen=True)
class AYS(GridMethod):
    """Sabour 2024: minimise KLUB = sum over steps of int E |D(x_t, t) - D(x_i, t_i)|^2 / sigma^3 d sigma.

    The paper descends on times with importance samples and early stopping. Here the differences between all pairs of
    levels are measured once, on one forward path for each sample, and the best grid among the levels is found
    exactly. The grid ends at `low`, whose place 0 takes, as in the published tables.

    Args:
        levels: levels that are measured, and that the grid is chosen from.
        high, low: sigma / alpha between which they lie, evenly in log-SNR; the prior comes on top.
    """

    levels: int = 64
    high: float = 50.0
    low: float = 0.02

    summary = "Align Your Steps: the grid of the smallest Kullback-Leibler bound"
    paper = "Align Your Steps (2404.14507), section 3"

    def __post_init__(self) -> None:
        check_levels("ays", self.levels, self.high, self.low)

    def fit(self, problem: GridProblem) -> Fitted:
        if problem.noise.discrete:
            raise ConfigError("ays compares real-valued answers; for a token model use --method dp")
        times = nodes(problem.noise, self.levels, self.high, self.low)
        costs = klub_costs(differences(problem, times), snr(problem.noise, times))
        path, total = best_path(costs, problem.steps)
        return Fitted([*times[path[:-1]].tolist(), 0.0], total)
