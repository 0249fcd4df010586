"""Fast-dLLM's parallel decoding: uncover every token that is certain enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, check_block, require_masks, unmasking_effects

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver
    from suite.plugins.solvers._unmasking import Ranking
    from suite.run import Run


@dataclass(frozen=True)
class Above:
    """How many drawn tokens have a chance above the threshold, or satisfy (n + 1) (1 - c_n) < factor at rank n.

    The second is Fast-dLLM's theorem 1: n tokens of at least that chance each are the most probable joint choice
    if factor <= 1.
    """

    threshold: float
    factor: float = 0.0

    def __call__(self, ranking: Ranking) -> Tensor:
        import torch

        certainty = ranking.ordered(ranking.certainty)
        if not self.factor:
            return ranking.leading(certainty > self.threshold)
        number = torch.arange(1, certainty.shape[1] + 1, device=certainty.device)
        return ranking.leading((number + 1) * (1 - certainty) < self.factor)


@dataclass(frozen=True)
class Threshold(Plugin):
    """Wu 2025, section 3.3: uncover all tokens whose chance is above a threshold, and the best one in any case.

    A step uncovers no fewer places than the schedule expects, so that the number of steps is the most that is
    spent. With as many steps as tokens the threshold alone decides.

    Args:
        threshold: 1 uncovers one token a step, less is faster.
        factor: above 0 replaces the threshold by one that falls with the number of tokens: n of them are uncovered
            while (n + 1) (1 - chance of the n-th) < factor.
        temperature: of the draw; 0 takes the most probable token.
        top_p: draw only from the most probable tokens that have this chance together.
        block: places that are filled before those to their right begin; 0 is the whole text.
    """

    threshold: float = 0.9
    factor: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    block: int = 0

    summary = "masked tokens: uncover every one that is certain enough (Fast-dLLM's parallel decoding)"
    paper = "Fast-dLLM (2505.22618), section 3.3, theorem 1"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("threshold")
        check_block("threshold", self.block)
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold: threshold = {self.threshold}: expected a chance in [0, 1]; 1 is one a step")
        if self.factor < 0:
            raise ConfigError(f"threshold: factor = {self.factor}: expected 0 (off) or more, e.g. 1")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return unmasking_effects(self.temperature, "confidence", variable=True)

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("threshold", noise)
        from suite.plugins.solvers._unmasking import Unmasking

        rule = Above(self.threshold, self.factor)
        return Unmasking(noise, Draw(self.temperature, self.top_p), "confidence", rule, self.block)
