"""The first-hitting sampler: the times at which masked tokens are uncovered are drawn, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import AdaptiveSolver, Denoise, SolverFacts
from suite.errors import SuiteError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, is_open, require_masks

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.solver import Solver
    from suite.run import Run


@dataclass(frozen=True)
class FirstHittingSolver(AdaptiveSolver):
    """With n masks at chance sigma of being masked, the next one goes at the chance sigma u^(1/n), u uniform.

    That is when the first of n independent clocks rings, each of which has rung with chance 1 - sigma'/sigma by the
    time of sigma'. Which one it is, is uniform. The network is told the time of the last hit: the exact posterior
    of masked tokens does not depend on it. Where fewer evaluations than masks are left, several hits share one.
    """

    noise: NoiseSchedule
    draw: Draw
    facts = SolverFacts(order=1, stochastic=True, adaptive=True, discrete=True, variable=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        raise SuiteError("the first-hitting sampler draws its own times: call `solve`")

    def solve(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, budget: int, rng: SampleRng) -> Tensor:
        import torch

        from suite.diffusion.noise import bisect_time

        sigma, last = self.noise.sigma(t).expand(x.shape[0]), self.noise.sigma(s)
        masked, time, row = None, t, x.shape[1:]
        for remaining in range(budget, 0, -1):
            probabilities = denoise(x, time)
            masked = is_open(probabilities, x) if masked is None else masked
            drawn = self.draw(probabilities, lambda: rng.uniform(row))
            hits = -(masked.sum(-1) // -remaining)
            chance = rng.uniform((2, x.shape[1])).double()  # as many for every sample, whatever the others need
            for hit in range(int(hits.max())):
                left = masked.sum(-1)
                following = sigma * chance[:, 0, hit] ** (1 / left.cpu().clamp(min=1))
                rings = ((left > 0) & (hit < hits)).cpu() & (following >= last)
                sigma = torch.where(rings | (hit >= hits).cpu(), torch.where(rings, following, sigma), -1.0)
                chosen = (chance[:, 1, hit].to(x.device) * left).long().clamp(max=x.shape[1] - 1)
                at = masked & (masked.cumsum(-1) == chosen[:, None] + 1) & rings.to(x.device)[:, None]
                x, masked = torch.where(at, drawn, x), masked & ~at
            if not (masked.any(-1).cpu() & (sigma >= 0)).any():
                break
            time = bisect_time(self.noise.alpha, 1 - sigma.clamp(min=0))
        return x


@dataclass(frozen=True)
class FirstHitting(Plugin):
    """Zheng 2024, section 4: the exact reverse process of masking, without the steps in which nothing happens.

    One token is uncovered an evaluation, so the result has the model's own distribution, as `mdlm` only has it in
    the limit of many steps. It spends as many evaluations as there are masks; with fewer steps than masks tokens
    share evaluations, evenly.

    Args:
        temperature: below 1 prefers probable tokens; 0 takes the most probable one.
        top_p: draw only from the most probable tokens that have this chance together.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    summary = "masked tokens: draw the times at which they are uncovered, one an evaluation (first hitting)"
    paper = "First-hitting sampler (2409.02908), section 4, algorithm 1"
    effects = frozenset({"stochastic-step", "adaptive-grid", "variable-evaluations", "time-grid"})

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("first-hitting")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        require_masks("first-hitting", noise)
        return FirstHittingSolver(noise, Draw(self.temperature, self.top_p))
