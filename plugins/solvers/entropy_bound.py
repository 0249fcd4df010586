"""Entropy-bounded unmasking: as many tokens a step as are nearly independent of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import By, Draw, check_block, require_masks, unmasking_effects

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver
    from suite.plugins.solvers._unmasking import Ranking
    from suite.run import Run


@dataclass(frozen=True)
class Bounded:
    """The longest prefix of the ranking whose entropies, summed without their largest, stay within the bound.

    That sum is at least what the tokens tell of each other, whatever their joint distribution is. The first place
    always fits.
    """

    bound: float

    def __call__(self, ranking: Ranking) -> Tensor:
        from suite.plugins.solvers._unmasking import entropy

        h = ranking.ordered(entropy(ranking.probabilities)) * ranking.eligible
        others = h.cumsum(-1) - h.cummax(-1).values
        return ranking.leading(others <= self.bound + 1e-12)


@dataclass(frozen=True)
class EntropyBound(Plugin):
    """Ben-Hamu 2025, algorithm 1: uncover the places U that come first while sum_U H - max_U H <= bound.

    A step uncovers no fewer places than the schedule expects, so that the number of steps is the most that is
    spent, and at least one. With as many steps as tokens the bound alone decides.

    Args:
        bound: in nats; 0 uncovers one uncertain token a step, more is faster.
        by: the order in which places are tried: small `entropy`, `confidence`, `margin` or `random`.
        temperature: of the draw; 0 takes the most probable token. Entropies are those of the model.
        top_p: draw only from the most probable tokens that have this chance together.
        block: places that are filled before those to their right begin; 0 is the whole text.
    """

    bound: float = 0.1
    by: By = "entropy"
    temperature: float = 1.0
    top_p: float = 1.0
    block: int = 0

    summary = "masked tokens: uncover as many a step as are nearly independent, by their entropies"
    paper = "EB-Sampler (2505.24857), algorithm 1"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("entropy-bound")
        check_block("entropy-bound", self.block)
        if self.bound < 0:
            raise ConfigError(f"entropy-bound: bound = {self.bound}: expected 0 or more nats; 0 is a token a step")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return unmasking_effects(self.temperature, self.by, variable=True)

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("entropy-bound", noise)
        from suite.plugins.solvers._unmasking import Unmasking

        return Unmasking(noise, Draw(self.temperature, self.top_p), self.by, Bounded(self.bound), self.block)
