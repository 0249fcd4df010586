"""The three published grids of Align Your Steps, and log-linear interpolation to other numbers of steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suite.diffusion.schedule import Schedule, with_exact_ends
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run

#: sigma / alpha at ten stops; 0 follows. As NVIDIA published them and diffusers lists them (`AysSchedules`).
TABLES: dict[str, tuple[float, ...]] = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}


def position(table: tuple[float, ...], level: float) -> float:
    """Where on the table a level lies, log-linear between its rows; beyond its ends, the end."""
    logs = [-math.log(entry) for entry in table]
    wanted = math.inf if level == 0 else -math.log(level)
    if wanted <= logs[0]:
        return 0.0
    for row, (one, two) in enumerate(itertools.pairwise(logs)):
        if wanted <= two:
            return row + (wanted - one) / (two - one)
    return len(table) - 1.0


@dataclass(frozen=True)
class TableTimes(Schedule):
    """n levels at even places of a table, log-linear between its rows; the first is moved to exactly 1, 0 is added.

    Levels noisier than the model's prior, or cleaner than its data, are left out before the rest is spread.
    """

    table: tuple[float, ...]

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import numpy as np
        import torch

        def level(t: float) -> float:
            return math.exp(-float(noise.log_snr(t)) / 2)

        first, last = position(self.table, level(1.0)), position(self.table, level(0.0))
        # Where the data themselves are noisier than the last row, the place of the last row is that of 0.
        clean = level(0.0) < self.table[-1]
        places = np.linspace(first, last, steps if clean else steps + 1)[: max(1, steps)]
        logs = np.interp(places, np.arange(len(self.table)), np.log(self.table))
        return with_exact_ends(noise.time_at(torch.from_numpy(-2 * logs[1:])))


@dataclass(frozen=True)
class AYS(Plugin):
    """Grids that NVIDIA optimised for Stable Diffusion 1.5, SDXL and Stable Video Diffusion, at 10 steps.

    They are levels of noise in those models' latents. For a model of your own, `suite schedule optimize --method
    ays` finds its grid, and `grid:file=...` uses it.

    Args:
        model: whose table: `sd`, `sdxl` or `svd`.
    """

    model: Literal["sd", "sdxl", "svd"] = "sd"

    summary = "the three published tables of Align Your Steps, interpolated log-linearly"
    paper = "Align Your Steps (2404.14507), appendix"
    effects = frozenset({"time-grid", "optimised-grid"})

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        if noise.discrete:
            raise ConfigError("ays holds levels of Gaussian noise; a token model has none: use --schedule uniform")
        return TableTimes(TABLES[self.model])
