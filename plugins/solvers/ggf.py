"""Gotta Go Fast: the reverse SDE with steps as long as each sample allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver, SolverFacts, combine, expand
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._stochastic import posterior_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

FIRST = 0.01
"""Length of the first trial step, as in the paper."""
LEAST = 1e-3
"""Where the SDE ends and the last denoising begins."""
SAFETY, EXPONENT = 0.9, 0.9
BETA = (0.1, 20.0)


@dataclass(frozen=True)
class GGFSolver(AdaptiveSolver):
    """Euler-Maruyama proposes, stochastic Heun with the same noise judges, and what Heun says is kept.

    It runs on the VP-SDE of linear beta, whatever the model's family: x / sqrt(alpha^2 + sigma^2) at the time of
    equal log-SNR is its state. Every sample has its own time and step. A rejected step does not draw again: the
    shorter one follows the same Brownian path. The last step is the ancestral one.
    """

    noise: NoiseSchedule
    relative: float
    absolute: float
    limit: int
    facts = SolverFacts(order=1, evaluations=2, stochastic=True, adaptive=True, exact=False, affine=False)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        return self.solve(denoise, x, t, s, self.limit, rng), state

    def solve(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, budget: int, rng: SampleRng) -> Tensor:
        import torch

        from suite.diffusion.noise import VPLinear
        from suite.plugins.solvers._brownian import paths

        if t.ndim:
            raise ConfigError("ggf has one start for all; use a schedule without per-group times")
        noise, vp = self.noise, VPLinear(*BETA)
        start = vp.time_at(noise.log_snr(t).clamp(min=float(vp.log_snr(1.0))))
        last = vp.time_at(noise.log_snr(s)).clamp(min=LEAST)
        if start <= last:
            return combine(posterior_weights(noise, t, s), (x, denoise(x, t), rng.normal_like(x)))
        most, used = min(budget, self.limit), 0
        if not is_regular(noise, t):  # the VP-SDE begins with a little signal
            begin = noise.time_at(vp.log_snr(start))
            x, t, used = combine(posterior_weights(noise, t, begin), (x, denoise(x, t), rng.normal_like(x))), begin, 1

        def scale(at: Tensor) -> Tensor:
            return (noise.alpha(at) ** 2 + noise.sigma(at) ** 2).sqrt()

        def ours(u: Tensor) -> Tensor:
            return noise.time_at(vp.log_snr(u))

        def rate(u: Tensor) -> Tensor:
            return BETA[0] + (BETA[1] - BETA[0]) * u

        def drift(y: Tensor, u: Tensor) -> Tensor:
            """What a step of length h, down in time, adds h times: beta (x / 2 + score)."""
            nonlocal used
            used += 1
            if used > most:
                raise ConfigError(f"ggf needs more than its limit of {most} evaluations: use a larger relative")
            now = ours(u)
            x0 = denoise(y * expand(scale(now), y), now)
            score = -(y - expand(vp.alpha(u), y) * x0) / expand(vp.sigma(u) ** 2, y)
            return expand(rate(u), y) * (y / 2 + score)

        count, axes = x.shape[0], tuple(range(1, x.ndim))
        y = x / expand(scale(t), x)
        u = torch.full((count,), float(start), dtype=torch.float64)
        h = torch.full_like(u, min(FIRST, float(start - last)))
        before, walks = y, paths(rng.generators, x)
        slope = drift(y, u)
        while bool((u > last).any()):
            end = (u - h).maximum(last.expand(count))
            length = u - end
            places = [(float(start - a), float(start - b)) for a, b in zip(u, end, strict=True)]
            dw = torch.stack([walk.at(b) - walk.at(a) for walk, (a, b) in zip(walks, places, strict=True)]).to(x)
            proposed = y + expand(length, y) * slope + expand(rate(u).sqrt(), y) * dw
            there = drift(proposed, end)
            heun = y + expand(length, y) * there + expand(rate(end).sqrt(), y) * dw
            better = (proposed + heun) / 2
            allowed = (self.relative * proposed.abs().maximum(before.abs())).clamp(min=self.absolute)
            error = ((proposed - better) / allowed).square().mean(axes).sqrt().double().cpu()
            moving = length > 0
            kept = moving & (error <= 1)
            if bool(kept.any()):
                mask = expand(kept.double(), y) > 0
                y, before = better.where(mask, y), proposed.where(mask, before)
                u = end.where(kept, u)
                for walk, (_, b), keep in zip(walks, places, kept.tolist(), strict=True):
                    if keep:
                        walk.forget(b)
                if bool((u > last).any()):
                    # The Heun point is not where the proposal's slope was taken.
                    slope = drift(y, u)
            h = (SAFETY * length * error.clamp(min=1e-6) ** -EXPONENT).minimum(u - last).where(moving, 0.0)
        end = ours(last)
        x = y * expand(scale(end), y)
        if float(noise.log_snr(s)) <= float(vp.log_snr(last)):
            return x
        return combine(posterior_weights(noise, end, s), (x, denoise(x, end), rng.normal_like(x)))

    def evaluations(self, steps: int) -> int:
        """The limit, and two for the ends; how many are used depends on the tolerance, and rejected steps count."""
        del steps
        return self.limit + 2


@dataclass(frozen=True)
class GGF(Plugin):
    """Jolicoeur-Martineau 2021, algorithm 1, for any continuous noise schedule.

    Args:
        relative: error allowed in a step, relative to the state.
        absolute: the least error that matters; half a grey value of 256 in [-1, 1] is 0.0039.
        limit: evaluations after which it gives up.
    """

    relative: float = 0.05
    absolute: float = 0.0078
    limit: int = 10_000

    summary = "Gotta Go Fast: adaptive steps on the reverse SDE, for each sample its own"
    paper = "Gotta Go Fast (2105.14080), algorithm 1"
    orders = "1"
    effects = frozenset({"adaptive-grid", "repeated-evaluations", "stochastic-step"})

    def __post_init__(self) -> None:
        for name in ("relative", "absolute"):
            if not 0 < getattr(self, name) <= 10:
                raise ConfigError(f"ggf: {name} = {getattr(self, name)}: expected a number above 0, up to 10")
        if self.limit < 2:
            raise ConfigError(f"ggf: limit = {self.limit}: expected at least 2")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return GGFSolver(noise, self.relative, self.absolute, self.limit)
