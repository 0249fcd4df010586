"""LLaDA's remasking: each step uncovers the tokens that the network is most certain of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import By, Draw, check_block, require_masks, unmasking_effects

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver
    from suite.run import Run


@dataclass(frozen=True)
class Confidence(Plugin):
    """Nie 2025, algorithm 5; MaskGIT (Chang 2022) for text. Easy tokens come first, and guide the hard ones.

    Its texts are more probable than the model's own distribution, not samples of it; `mdlm` is for those, and
    `by=random`, which uncovers as many places a step as the schedule expects, wherever they are.

    Args:
        temperature: of the draw; 0 takes the most probable token, and then every seed gives the same text.
        top_p: draw only from the most probable tokens that have this chance together.
        by: what makes a place easy: `confidence` in its drawn token, the `margin` between the two most probable
            ones (Kim 2025), small `entropy`, or `random`: nothing.
        block: places that are filled before those to their right begin (LLaDA's semi-autoregressive blocks); 0 is
            the whole text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    by: By = "confidence"
    block: int = 0

    summary = "masked tokens: uncover the most certain ones of each step (LLaDA's remasking), whole or in blocks"
    paper = "LLaDA (2502.09992), algorithm 5; MaskGIT (2202.04200); margin: Kim 2025 (2502.06768), section 4"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("confidence")
        check_block("confidence", self.block)

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return unmasking_effects(self.temperature, self.by)

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("confidence", noise)
        from suite.plugins.solvers._unmasking import Unmasking

        return Unmasking(noise, Draw(self.temperature, self.top_p), self.by, block=self.block)
