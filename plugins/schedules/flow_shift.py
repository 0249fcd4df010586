"""The shifted flow grid: equal steps in t, shifted towards the prior as far as the sample is large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from suite.diffusion.schedule import Schedule
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.schedules.uniform import UniformTimes

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.run import Run


@dataclass(frozen=True)
class StretchedTimes(Schedule):
    """Shifted times, stretched so that the last one before 0 is `terminal`."""

    shift: float
    terminal: float

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        times = UniformTimes(self.shift).timesteps(noise, steps)
        if steps > 1:  # a single step has nothing between the prior and the data
            times[:-1] = 1 - (1 - times[:-1]) * (1 - self.terminal) / (1 - times[-2])
        return times


@dataclass(frozen=True)
class FlowShift(Plugin):
    """t = s u / (1 + (s - 1) u) for even u: in flow coordinates, log-SNR moved by -2 log s.

    A larger sample has more positions that say the same, so the same t hides less of it: the shift makes up for
    that. Works for tokens too, as a statement about t. Shifting twice is one shift by the product.

    Args:
        shift: s; left out, it comes from the number of tokens that the network attends over.
        rule: how. `sqrt`: s = sqrt(tokens / base_tokens) (SD3, eq. 23). `exponential`: s = e^mu with mu linear in
            the tokens, base_shift at base_tokens and max_shift at max_tokens (FLUX). `linear`: s = that mu itself.
        base_tokens, max_tokens, base_shift, max_shift: see `rule`; `sqrt` uses base_tokens alone.
        terminal: stretch the times so that the last one before 0 is this (LTX-Video).
    """

    shift: float | None = None
    rule: Literal["sqrt", "exponential", "linear"] = "exponential"
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    terminal: float | None = None

    summary = "equal steps in time with a shift that depends on the size of the sample"
    paper = "SD3 (2403.03206), eq. 23"
    effects = frozenset({"time-grid"})
    acting_options: ClassVar[dict[str, Any]] = {"shift": 3.0}  # the kit's runs say nothing about tokens

    def __post_init__(self) -> None:
        if self.shift is not None and not 0 < self.shift <= 100:
            raise ConfigError(f"flow-shift: shift = {self.shift}: expected a number in (0, 100]; 1 changes nothing")
        if not 0 < self.base_tokens < self.max_tokens:
            raise ConfigError(
                f"flow-shift: base_tokens = {self.base_tokens}, max_tokens = {self.max_tokens}: expected "
                "0 < base_tokens < max_tokens"
            )
        if not 0 < self.base_shift <= self.max_shift <= 10:
            raise ConfigError(
                f"flow-shift: base_shift = {self.base_shift}, max_shift = {self.max_shift}: expected "
                "0 < base_shift <= max_shift <= 10"
            )
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ConfigError(f"flow-shift: terminal = {self.terminal}: expected a time between 0 and 1")

    def shift_for(self, tokens: int) -> float:
        """The shift of a sample of this many tokens."""
        if self.rule == "sqrt":
            return math.sqrt(tokens / self.base_tokens)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.rule == "exponential" else mu

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        del noise
        if self.shift is None and not run.tokens:
            raise ConfigError(
                f"flow-shift: the model {run.model} does not say how many tokens its network attends over; give the "
                "shift itself, e.g. flow-shift:shift=3"
            )
        shift = self.shift if self.shift is not None else self.shift_for(run.tokens)
        if shift <= 0:
            raise ConfigError(f"flow-shift: {run.tokens} tokens give the shift {shift:.3g}: give one with shift=")
        return UniformTimes(shift) if self.terminal is None else StretchedTimes(shift, self.terminal)
