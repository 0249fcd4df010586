"""DPM-Solver++(2S): second order, single step, two evaluations, data prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, transfer
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import between, is_regular, stopping_evaluations

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class DPMpp2SSolver(Solver):
    """The x0 at the middle of the step, in half log-SNR, takes the whole step.

    From alpha = 0 and to sigma = 0 there is no middle, and the step is DDIM's with one evaluation.
    """

    noise: NoiseSchedule
    facts = SolverFacts(order=2, evaluations=2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        x0 = denoise(x, t)
        if is_regular(self.noise, t, s):
            middle = between(self.noise, t, s, 0.5)
            x0 = denoise(transfer(self.noise, x, x0, t, middle), middle)
        return transfer(self.noise, x, x0, t, s), state

    def evaluations(self, steps: int) -> int:
        """2 a step, but 1 from alpha = 0 and 1 to sigma = 0."""
        return stopping_evaluations(self.noise, 2, steps)


@dataclass(frozen=True)
class DPMpp2S(Plugin):
    """Lu 2022, algorithm 1, with the stop at the middle."""

    summary = "DPM-Solver++(2S), second order, two evaluations a step"
    paper = "DPM-Solver++ (2211.01095), algorithm 1"
    orders = "2"
    effects = frozenset({"repeated-evaluations"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DPMpp2SSolver(noise)
