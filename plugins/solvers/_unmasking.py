"""Uncovering masked tokens in an order of their own: what the solvers that rank places have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.plugins.solvers._tokens import By, Draw, is_open

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class Progress:
    """What a run has done so far.

    Attributes:
        first: [B] masked places at the first step.
        sigma: chance of being masked there.
        open: [B, L] the places that are masked now.
        mask: the mask's token, -1 if there was no mask at the first step.
    """

    first: Tensor
    sigma: Tensor
    open: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Ranking:
    """One evaluation, its places in the order in which they are to be uncovered.

    Attributes:
        probabilities: [B, L, V] of the evaluation.
        certainty: [B, L] chance of the token that was drawn for each place.
        order: [B, L] places, best first; those that may not be uncovered now come last.
        eligible: [B, L] in that order: which may be uncovered now.
    """

    probabilities: Tensor
    certainty: Tensor
    order: Tensor
    eligible: Tensor

    def ordered(self, values: Tensor) -> Tensor:
        """[B, L] values of places in the order of the ranking."""
        return values.gather(-1, self.order)

    def leading(self, accepted: Tensor) -> Tensor:
        """[B] how many places in a row, from the best on, are accepted; `accepted` [B, L] is in order."""
        return (accepted & self.eligible).long().cumprod(-1).sum(-1)


#: How many places the data allow to uncover at once, [B].
Rule = Callable[[Ranking], "Tensor"]


@dataclass(frozen=True)
class Unmasking(Solver):
    """Draws a token for every masked place, ranks the places, and uncovers the best ones; the others stay masked.

    After a step to s at most floor(M sigma_s / sigma_1) of the M places that were masked at first are left: the
    number that the schedule expects, for every sample alike. With a `rule` more of them may go, at least one a step,
    and once none is left the remaining steps cost nothing.

    Attributes:
        by: the order of places; see `evidence`.
        rule: how many places the data allow; None keeps to the schedule.
        block: places that are filled before those to their right begin; 0 is the whole text.
    """

    noise: NoiseSchedule
    draw: Draw
    by: By = "confidence"
    rule: Rule | None = None
    block: int = 0

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        chance = self.draw.temperature > 0 or self.by == "random"
        return SolverFacts(order=1, stochastic=chance, discrete=True, variable=self.rule is not None)

    def init(self, run: Run) -> None:
        """Nothing: what is masked is known at the first evaluation."""
        del run

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        if state is not None and self.rule is not None and not state.open.any():
            return x, state
        probabilities = denoise(x, t)
        if state is None:
            masked = is_open(probabilities, x)
            state = Progress(masked.sum(-1), self.noise.sigma(t), masked, torch.where(masked, x, -1).max())
        owed = state.open.sum(-1) - self._left(state, s)
        least = owed.clamp(min=1) if self.rule else owed
        eligible = within_blocks(state.open, least, self.block)
        drawn = self._drawn(probabilities, x, eligible, rng)
        certainty = probabilities.gather(-1, drawn[..., None])[..., 0]
        score = evidence(self.by, probabilities, certainty, lambda: rng.uniform(x.shape[1:]).to(x.device))
        ranking = rank(probabilities, certainty, score, state.open, least, self.block)
        count = torch.maximum(least, self.rule(ranking)) if self.rule else least
        chosen = torch.arange(x.shape[1], device=x.device) < count[:, None]
        uncovered = torch.zeros_like(state.open).scatter(-1, ranking.order, chosen & ranking.eligible)
        left = Progress(state.first, state.sigma, state.open & ~uncovered, state.mask)
        return torch.where(uncovered, drawn, x), left

    def _drawn(self, probabilities: Tensor, x: Tensor, eligible: Tensor, rng: SampleRng) -> Tensor:
        """Tokens [B, L]: drawn where a place may be uncovered now, x elsewhere; a draw costs as much as a layer."""
        here = eligible.nonzero(as_tuple=True)
        drawn = x.clone()
        drawn[here] = self.draw(probabilities[here], lambda: rng.uniform(x.shape[1:]).to(x.device)[here])
        return drawn

    def _left(self, state: Progress, s: Tensor) -> Tensor:
        """[B] most places that may be masked at time s."""
        share = (self.noise.sigma(s) / state.sigma).to(state.first.device)
        # 1e-9: 24 (1 - 0.75) must be 6 although sigma is rounded.
        return (state.first * share + 1e-9).floor().long()


def evidence(by: By, probabilities: Tensor, certainty: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """[B, L] what a place is ranked by, larger first.

    `confidence` is the chance of the drawn token (MaskGIT; LLaDA's low-confidence remasking), `margin` the lead of
    the most probable token over the next (Kim 2025, 2502.06768), `entropy` that of the distribution, smallest first
    (Ben-Hamu 2025), and `random` no evidence at all (LLaDA's random remasking).
    """
    if by == "confidence":
        return certainty
    if by == "margin":
        best = probabilities.topk(2, -1).values
        return best[..., 0] - best[..., 1]
    if by == "entropy":
        return -entropy(probabilities)
    return uniform().to(certainty)


def entropy(probabilities: Tensor) -> Tensor:
    """[B, L] in nats, float64."""
    return torch.special.entr(probabilities.double()).sum(-1)


def within_blocks(masked: Tensor, least: Tensor, block: int) -> Tensor:
    """[B, L] masked places of the first block that has any, and of as many further blocks as `least` [B] fills."""
    if not block:
        return masked
    place = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
    filled = masked & (masked.cumsum(-1) == least.clamp(min=1)[:, None])
    last = torch.where(filled, place, 0).amax(-1, keepdim=True)
    last = torch.where(filled.any(-1, keepdim=True), last, masked.shape[1] - 1)
    return masked & (place < (last // block + 1) * block)


def rank(probabilities: Tensor, certainty: Tensor, score: Tensor, masked: Tensor, least: Tensor, block: int) -> Ranking:
    """Order the masked places by score, blocks from left to right, what is not eligible (`within_blocks`) last."""
    eligible = within_blocks(masked, least, block)
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    if block:
        place = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
        number = torch.where(eligible, place // block, masked.shape[1])
        order = order.gather(-1, number.gather(-1, order).argsort(dim=-1, stable=True))
    return Ranking(probabilities, certainty, order, eligible.gather(-1, order))
