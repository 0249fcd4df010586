"""MDLM's ancestral solver: every masked token is uncovered with the chance that the schedule gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, by_row, is_open, require_masks

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class MDLMSolver(Solver):
    """x_s ~ (1 - r) x_t + r p(x0 given x_t) with r = (alpha_s - alpha_t) / (1 - alpha_t).

    Known tokens have p(x0) = x_t, so they stay without being asked for.
    """

    noise: NoiseSchedule
    draw: Draw
    facts = SolverFacts(order=1, stochastic=True, discrete=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        probabilities = denoise(x, t)
        alpha_t, alpha_s = (by_row(self.noise.alpha(time), x) for time in (t, s))
        chance = (alpha_s - alpha_t) / (1 - alpha_t)
        # A draw costs more than a small network does, so only the places that need one get it.
        uncover = (rng.uniform(x.shape[1:]).to(x.device) < chance) & is_open(probabilities, x)
        drawn = self.draw(probabilities[uncover], lambda: rng.uniform(x.shape[1:]).to(x.device)[uncover])
        return x.masked_scatter(uncover, drawn), state


@dataclass(frozen=True)
class MDLM(Plugin):
    """Sahoo 2024, eq. 7: the exact reverse process of masking, if one token is uncovered at a time.

    Tokens uncovered in the same step are drawn independently of each other: with fewer steps than tokens that is
    the method's error, and its only one.

    Args:
        temperature: below 1 prefers probable tokens; 0 takes the most probable one.
        top_p: draw only from the most probable tokens that have this chance together.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    summary = "masked tokens: uncover each with the schedule's chance (MDLM's ancestral rule)"
    paper = "MDLM (2406.07524), eq. 7"
    effects = frozenset({"stochastic-step"})

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("mdlm")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("mdlm", noise)
        return MDLMSolver(noise, Draw(self.temperature, self.top_p))
