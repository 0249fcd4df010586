"""The beta grid: steps at the quantiles of a beta distribution, more of them at both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suite.diffusion.schedule import Schedule, above_end
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules._levels import HIGH, check_ends, grid, level, refuse_tokens, span

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


LOW = 0.01


@dataclass(frozen=True)
class BetaTimes(Schedule):
    """t_i = F^-1(1 - i/n), F the distribution function of Beta(alpha, beta); or the levels so, between two times."""

    alpha: float
    beta: float
    of: Literal["t", "ratio", "sigma"]
    high: float
    low: float

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch
        from scipy.special import betaincinv

        count = steps + 1 if self.of == "t" else steps
        ramp = torch.linspace(1, 0, count, dtype=torch.float64)
        part = torch.from_numpy(betaincinv(self.alpha, self.beta, ramp.numpy()))
        if self.of == "t":
            return above_end(noise, part)
        most, least = (level(noise, t, self.of) for t in (self.high, self.low))
        return grid(noise, least + part * (most - least), self.of)


@dataclass(frozen=True)
class Beta(Plugin):
    """Lee 2024: an even share of steps for the coarse and the fine, few between; diffusers' `use_beta_sigmas`.

    Args:
        alpha, beta: below 1 they crowd the steps at the ends; 1 and 1 is uniform.
        of: what is spread so: `t` (the paper), or the level `ratio` = sigma / alpha or `sigma` (diffusers, for VP
            and VE models and for flow models).
        high, low: times between which a level is spread; left out, the noise family's own, else 0.98 and 0.01.
            `t` goes from 1 to 0.
    """

    alpha: float = 0.6
    beta: float = 0.6
    of: Literal["t", "ratio", "sigma"] = "t"
    high: float | None = None
    low: float | None = None

    summary = "quantiles of a beta distribution: more steps at both ends"
    paper = "Beta Sampling is All You Need (2407.12173)"
    effects = frozenset({"time-grid"})

    def __post_init__(self) -> None:
        if not (0.2 <= self.alpha <= 10 and 0.2 <= self.beta <= 10):
            raise ConfigError(f"beta: alpha = {self.alpha}, beta = {self.beta}: expected numbers from 0.2 to 10")
        check_ends("beta", LOW if self.low is None else self.low, HIGH if self.high is None else self.high)

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del run
        refuse_tokens("beta", noise, self.of)
        return BetaTimes(self.alpha, self.beta, self.of, *span(noise, self.high, self.low, LOW))
