"""Times by a density: quantiles of it for sampling, draws from it for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suite.diffusion.schedule import Schedule, above_end, with_exact_ends
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run

Kind = Literal["logit-normal", "mode", "u-shaped", "uniform"]


@dataclass(frozen=True)
class DensityTimes(Schedule):
    """t = Q(u), Q the quantile function of the density; u even for sampling, random for training."""

    kind: Kind
    mean: float
    std: float
    scale: float

    def quantile(self, u: Tensor) -> Tensor:
        """Q(u), rising, from [0, 1] to [0, 1]."""
        import math

        import torch

        if self.kind == "logit-normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        if self.kind == "mode":
            # SD3 writes 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls; this is the same of 1 - u.
            return u - self.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)
        if self.kind == "u-shaped":
            half = math.sinh(self.scale / 2)
            return 0.5 + torch.asinh((2 * u - 1) * half) / self.scale
        return u

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return above_end(noise, with_exact_ends(self.quantile(u[1:-1])))

    def training_times(self, batch: int, rng: torch.Generator) -> Tensor:
        return self.quantile(super().training_times(batch, rng))


@dataclass(frozen=True)
class Density(Plugin):
    """Densities of training times, and the grids that follow them. In t alone, so for tokens too.

    Args:
        kind: `logit-normal`: logit of t is N(mean, std^2) (SD3, eq. 19). `mode`: t = u - scale (sin^2(pi u / 2) - u)
            (SD3, eq. 20). `u-shaped`: p(t) in proportion to e^(scale t) + e^(scale (1 - t)), for flows that are
            straight but at their ends (2-rectified flow++). `uniform`.
        mean, std: of `logit-normal`.
        scale: of `mode`, from -1 (uniform is 0) to 2 / (pi - 2); of `u-shaped`, above 0.
    """

    kind: Kind = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    scale: float | None = None

    summary = "times by a density: logit-normal, mode, U-shaped; for training and as quantiles for sampling"
    paper = "SD3 (2403.03206), section 3.1; 2-rectified flow++ (2405.20320), section 4"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not (-10 <= self.mean <= 10 and 0.01 <= self.std <= 10):
            raise ConfigError(f"density: mean = {self.mean}, std = {self.std}: expected -10 to 10 and 0.01 to 10")
        if self.kind == "mode" and not -1 <= self._scale <= 1.75:
            raise ConfigError(f"density: scale = {self.scale}: expected -1 to 1.75, where t rises with u")
        if self.kind == "u-shaped" and not 0.01 <= self._scale <= 50:
            raise ConfigError(f"density: scale = {self.scale}: expected 0.01 to 50")

    @property
    def _scale(self) -> float:
        """The papers' values where none is given."""
        return self.scale if self.scale is not None else {"mode": 1.29, "u-shaped": 4.0}.get(self.kind, 0.0)

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del noise, run
        return DensityTimes(self.kind, self.mean, self.std, self._scale)
