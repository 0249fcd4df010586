"""Block refinement: text block by block, each filled by certainty and then edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, check_block, require_masks, unmasking_effects
from suite.plugins.solvers.threshold import Above

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.plugins.solvers._unmasking import Progress, Unmasking
    from suite.run import Run


@dataclass(frozen=True)
class _Committed:
    """Where the filling stands, and the chance [B, L] that each token had when it was last decided."""

    inner: Progress
    certainty: Tensor


@dataclass(frozen=True)
class BlockRefinementSolver(Solver):
    """Fills a block as `threshold` does, then masks its least certain tokens again and asks for them anew.

    A new token takes the old one's place if it differs and its chance is above `edit`. That chance is the model's
    p(token given all others), so an edit is a step of Gibbs sampling cut to confident moves.
    """

    filling: Unmasking
    edits: int
    places: int
    edit: float

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        inner = self.filling.facts
        return SolverFacts(1, 1 + self.edits, stochastic=inner.stochastic, discrete=True, variable=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        import torch

        seen: list[Tensor] = []

        def watched(x: Tensor, t: Tensor) -> Tensor:
            seen.append(denoise(x, t))
            return seen[0]

        filled, inner = self.filling.step(watched, x, t, s, state and state.inner, rng)
        if not seen:
            return filled, state
        before = state.inner.open if state else inner.open | (filled != x)
        new = before & ~inner.open
        certainty = state.certainty if state else seen[0].new_full(x.shape, torch.inf)
        certainty = torch.where(new, seen[0].gather(-1, filled[..., None])[..., 0], certainty)
        finished = self._finished(inner.open, new) & certainty.isfinite()
        for _ in range(self.edits):
            chosen = self._weakest(certainty, finished)
            # Drawn for every sample at every edit, so that a sample does not depend on its batch.
            numbers = rng.uniform(x.shape[1:]).to(x.device)
            if not chosen.any():
                continue
            probabilities = denoise(torch.where(chosen, inner.mask, filled), s)
            drawn = self.filling.draw(probabilities, lambda numbers=numbers: numbers)
            chance = probabilities.gather(-1, drawn[..., None])[..., 0]
            replaced = chosen & (drawn != filled) & (chance > self.edit)
            filled = torch.where(replaced, drawn, filled)
            kept = probabilities.gather(-1, filled[..., None])[..., 0]
            certainty = torch.where(chosen, kept, certainty)
        return filled, _Committed(inner, certainty)

    def _finished(self, masked: Tensor, new: Tensor) -> Tensor:
        """[B, L] places of blocks in which this step uncovered the last mask."""
        import torch

        block = self.filling.block or masked.shape[1]
        number = torch.arange(masked.shape[1], device=masked.device) // block
        count = int(number[-1]) + 1
        index = number.expand_as(masked)
        left, came = (masked.new_zeros(masked.shape[0], count, dtype=torch.long).scatter_add(
            -1, index, part.long()) for part in (masked, new))  # fmt: skip
        return ((left == 0) & (came > 0)).gather(-1, index)

    def _weakest(self, certainty: Tensor, finished: Tensor) -> Tensor:
        """[B, L] the `places` least certain places of what is finished."""
        import torch

        order = certainty.masked_fill(~finished, torch.inf).argsort(dim=-1, stable=True)
        return (order.argsort(dim=-1) < self.places) & finished


@dataclass(frozen=True)
class BlockRefinement(Plugin):
    """LLaDA2's decoding: semi-autoregressive blocks, parallel within, and tokens that may be taken back.

    In each step the tokens of the current block whose chance is above `threshold` are kept, and no fewer than the
    schedule expects. When a block is full, `edits` more evaluations look again at its least certain tokens. A model
    that was trained on wrong tokens can edit those it sees; this one asks for them masked, which any masked model
    can answer.

    Args:
        block: tokens of a block; 0 is the whole text.
        threshold: chance above which a token is kept at once.
        edits: evaluations spent on a block that is full; 0 leaves it as it is.
        places: tokens that one edit looks at.
        edit: chance above which another token replaces one that was kept.
        temperature: of the draw; 0 takes the most probable token.
        top_p: draw only from the most probable tokens that have this chance together.
    """

    block: int = 8
    threshold: float = 0.95
    edits: int = 0
    places: int = 1
    edit: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0

    summary = "masked tokens: block by block from left to right, each filled by certainty and then edited (LLaDA2)"
    paper = "LLaDA (2502.09992), section 2.4; LLaDA2 (2512.15745), as in diffusers' BlockRefinementScheduler"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("block-refinement")
        check_block("block-refinement", self.block)
        for name in ("threshold", "edit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"block-refinement: {name} = {getattr(self, name)}: expected a chance in [0, 1]")
        if self.edits < 0 or self.places < 1:
            raise ConfigError(
                f"block-refinement: edits = {self.edits}, places = {self.places}: expected 0 or more evaluations "
                "of 1 or more tokens"
            )

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        own = unmasking_effects(self.temperature, "confidence", variable=True)
        return own | {"repeated-evaluations"} if self.edits else own

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("block-refinement", noise)
        from suite.plugins.solvers._unmasking import Unmasking

        draw = Draw(self.temperature, self.top_p)
        filling = Unmasking(noise, draw, "confidence", Above(self.threshold), self.block)
        if not self.edits:
            return filling
        return BlockRefinementSolver(filling, self.edits, self.places, self.edit)
