"""Restart: the probability flow by Heun, with jumps back to a noisier time and the flow down again."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import between
from suite.plugins.solvers._stochastic import noised
from suite.plugins.solvers.heun import HeunSolver

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.solver import SolverFacts
    from suite.run import Run


@dataclass(frozen=True)
class RestartSolver(Solver):
    """The step that passes `low` stops there; `jumps` times noise goes up to `high`, and Heun steps lead back down.

    The noise is exact in law, and it shrinks what error has been gathered, which the flow alone would carry on. With
    jumps = 0 this is Heun.
    """

    noise: NoiseSchedule
    jumps: int
    share: float
    low: float
    high: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        heun = HeunSolver(self.noise).facts
        return replace(heun, evaluations=self._most, stochastic=True, min_steps=2) if self.jumps else heun

    @property
    def _most(self) -> int:
        """Evaluations a step at most, those of the ways down spread over all steps."""
        return 4 + 2 * self.jumps * math.ceil(self.share + 1)

    def init(self, run: Run) -> Any:
        return self.stops(run.steps)

    def stops(self, steps: int) -> int:
        """Heun steps of each way down in a run of `steps` steps."""
        return math.ceil(self.share * steps)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        heun = HeunSolver(self.noise)
        passes = (t > self.low) & (s <= self.low)
        if not self.jumps or not bool(passes.any()):
            return heun.step(denoise, x, t, s, state, rng)
        if not bool(passes.all()):
            raise ConfigError(
                f"restart jumps with the whole sample, but only some of its parts pass t = {self.low} in this step; "
                "use a schedule with one time for all of them, or another solver"
            )
        low, high = t.new_full(t.shape, self.low), t.new_full(t.shape, self.high)
        x, _ = heun.step(denoise, x, t, low, None, rng)
        for _ in range(self.jumps):
            x = noised(self.noise, x, low, high, rng)
            inner = [between(self.noise, high, low, k / state) for k in range(1, state)]
            for u, v in itertools.pairwise((high, *inner, low)):
                x, _ = heun.step(denoise, x, u, v, None, rng)
        if bool((s < self.low).all()):
            x, _ = heun.step(denoise, x, low, s, None, rng)
        return x, state

    def evaluations(self, steps: int) -> int:
        """Heun's with the stop at `low`, and 2 for each step of a way down; fewer if the grid stops at `low` itself."""
        heun = HeunSolver(self.noise)
        return (
            heun.evaluations(steps + 1) + 2 * self.jumps * self.stops(steps) if self.jumps else heun.evaluations(steps)
        )


@dataclass(frozen=True)
class Restart(Plugin):
    """Xu 2023, algorithm 1, with one interval.

    Args:
        jumps: how often; 0 is Heun.
        share: Heun steps of each way down as a part of the run's steps, equally far apart in log-SNR.
        low, high: the interval, in times.
    """

    jumps: int = 2
    share: float = 0.25
    low: float = 0.15
    high: float = 0.45

    summary = "Restart: Heun with jumps back to a noisier time, second order"
    paper = "Restart (2306.14878), algorithm 1"
    orders = "2"

    def __post_init__(self) -> None:
        if not 0 <= self.jumps <= 100:
            raise ConfigError(f"restart: jumps = {self.jumps}: expected a whole number from 0 to 100")
        if not 0 < self.share <= 10:
            raise ConfigError(f"restart: share = {self.share}: expected a number above 0, up to 10")
        if not 0 < self.low < self.high < 1:
            raise ConfigError(f"restart: low = {self.low}, high = {self.high}: expected 0 < low < high < 1")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        jumping = {"stochastic-step", "time-jumps"} if self.jumps else set()
        return frozenset({"repeated-evaluations", *jumping})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return RestartSolver(noise, self.jumps, self.share, self.low, self.high)
