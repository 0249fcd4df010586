"""LLaDA's low-confidence remasking: each step uncovers the tokens that the network is most certain of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, is_open, require_masks
from suite.solver import Denoise, Solver, SolverFacts

if TYPE_CHECKING:
    from torch import Tensor

    from suite.noise import NoiseSchedule
    from suite.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class _Start:
    """Masked tokens of each sample at the first step, [B], and alpha there."""

    masked: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class ConfidenceSolver(Solver):
    """Draws a token for every masked place and keeps the most probable ones; the others stay masked.

    After a step to s, floor(M (1 - alpha_s) / (1 - alpha_1)) of the M places that were masked at first are left:
    the number that the schedule expects, for every sample alike.
    """

    noise: NoiseSchedule
    draw: Draw

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=1, stochastic=self.draw.temperature > 0, discrete=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        import torch

        probabilities = denoise(x, t)
        masked = is_open(probabilities, x)
        if state is None:
            state = _Start(masked.sum(-1), self.noise.alpha(t))
        drawn = self.draw(probabilities, lambda: rng.uniform(x.shape[1:]).to(x.device))
        share = ((1 - self.noise.alpha(s)) / (1 - state.alpha)).to(x.device)
        # 1e-9: 24 (1 - 0.75) must be 6 although 1 - alpha is rounded.
        left = (state.masked * share + 1e-9).floor().long()
        count = masked.sum(-1) - left
        certainty = probabilities.gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, -1)
        rank = certainty.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.where(masked & (rank < count[:, None]), drawn, x), state


@dataclass(frozen=True)
class Confidence(Plugin):
    """Nie 2025, algorithm 5; MaskGIT (Chang 2022) for text. Easy tokens come first, and guide the hard ones.

    Its texts are more probable than the model's own distribution, not samples of it; `mdlm` is for those.

    Args:
        temperature: of the draw; 0 takes the most probable token, and then every seed gives the same text.
        top_p: draw only from the most probable tokens that have this chance together.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    summary = "masked tokens: uncover the most certain ones of each step (LLaDA's low-confidence remasking)"
    paper = "LLaDA (2502.09992), algorithm 5; MaskGIT (2202.04200)"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("confidence")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"stochastic-step"}) if self.temperature > 0 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("confidence", noise)
        return ConfidenceSolver(noise, Draw(self.temperature, self.top_p))
