"""Dynamic programming: the grid of the best evidence bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.fitting.grid_fit import Fitted, GridMethod, GridProblem
from suite.plugins.schedules.optimize._curves import check_levels, errors, nodes, snr
from suite.plugins.schedules.optimize._path import best_path

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule


def bound_costs(noise: NoiseSchedule, times: Tensor, error: Tensor) -> Tensor:
    """[K, K] term of the negative evidence bound of the jump from time i to time j > i, an element.

    Real-valued data: KL(q(x_j given x_i, x0) | q(x_j given x_i, D(x_i))) = (SNR_j - SNR_i) E |x0 - D(x_i)|^2 / 2 (VDM,
    2107.00630). Tokens: (alpha_j - alpha_i) / (1 - alpha_i) times the surprise of what is masked (MDLM,
    2406.07524).

    Args:
        times: [K], falling. error: [K], as `errors` measures it.
    """
    if noise.discrete:
        kept = noise.alpha(times)
        weight = (kept[None] - kept[:, None]) / (1 - kept)[:, None]
        return weight.nan_to_num(0, 0, 0) * error[:, None]
    ratio = snr(noise, times)
    return (ratio[None] - ratio[:, None]) * error[:, None] / 2


@dataclass(frozen=True)
class DP(GridMethod):
    """Watson 2021: the bound is a sum of terms for each jump, so its best path of n jumps is found exactly.

    With the exact denoiser it is the grid of Align Your Steps: the two objectives differ by a constant. With a
    trained one it also counts where the network is wrong. For real-valued data the last term, from `low` to the
    data, is the same for all grids; 0 takes the place of `low`.

    Args:
        levels: times that are measured, and that the grid is chosen from.
        high, low: sigma / alpha between which they lie, evenly in log-SNR; tokens have them evenly in t, down to 0.
    """

    levels: int = 64
    high: float = 50.0
    low: float = 0.02

    summary = "dynamic programming on the evidence bound; serves tokens too"
    paper = "Watson 2021 (2106.03802), section 3"
    tokens = True

    def __post_init__(self) -> None:
        check_levels("dp", self.levels, self.high, self.low)

    def fit(self, problem: GridProblem) -> Fitted:
        if problem.noise.discrete and problem.mask_token is None:
            raise ConfigError("dp counts masked tokens; this token model has no mask")
        times = nodes(problem.noise, self.levels, self.high, self.low)
        path, total = best_path(bound_costs(problem.noise, times, errors(problem, times)), problem.steps)
        return Fitted([*times[path[:-1]].tolist(), 0.0], total)
