"""What the grids that are spaced in a noise level share: the level, its inverse, and their options.

The level is either the noise-to-signal ratio sigma / alpha, which diffusers calls sigma for VP and VE models, or
sigma(t) itself, which diffusers calls sigma for flow models. For tokens sigma(t) is the chance of not being kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from suite.diffusion.schedule import with_exact_ends
from suite.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule

Of = Literal["ratio", "sigma"]


def level(noise: NoiseSchedule, t: Tensor | float, of: Of) -> Tensor:
    """sigma / alpha or sigma at `t`, float64."""
    import torch

    return torch.exp(-noise.log_snr(t) / 2) if of == "ratio" else noise.sigma(t)


def time_of(noise: NoiseSchedule, value: Tensor, of: Of) -> Tensor:
    """The times at which the level is `value`, float64."""
    from suite.diffusion.noise import bisect_time

    if of == "ratio":
        return noise.time_at(-2 * value.log())
    return bisect_time(lambda t: -noise.sigma(t), -value)


def grid(noise: NoiseSchedule, values: Tensor, of: Of) -> Tensor:
    """[n + 1] times of n levels, falling: the first is moved to exactly 1, and 0 is added."""
    return with_exact_ends(time_of(noise, values[1:], of))


#: Times between which a level is spread where neither the user nor the noise family says any.
HIGH = 0.98


def span(noise: NoiseSchedule, high: float | None, low: float | None, last: float) -> tuple[float, float]:
    """First and last time between which a level is spread: as given, else the noise family's own, else HIGH and `last`.

    Raises:
        ConfigError: one was given, and lies beyond the other, which was not.
    """
    own = noise.ends or (HIGH, last)
    first, last = own[0] if high is None else high, own[1] if low is None else low
    if not last < first:
        raise ConfigError(f"a grid from t = {first:.3g} down to t = {last:.3g} is none: give both high and low")
    return first, last


def check_ends(name: str, low: float, high: float) -> None:
    """Refuse ends that are not times in order, in words that name the plugin."""
    if not 0 < low < high < 1:
        raise ConfigError(f"{name}: low = {low}, high = {high}: expected 0 < low < high < 1")


def refuse_tokens(name: str, noise: NoiseSchedule, of: str) -> None:
    """Refuse tokens where the level is the ratio, in words that name the plugin."""
    if noise.discrete and of == "ratio":
        raise ConfigError(
            f"{name} spaces times in sigma / alpha, which a token model has not: use --schedule uniform, or "
            f"{name}:of=sigma, which spaces them in the chance that a token is masked"
        )
