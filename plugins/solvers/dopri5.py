"""The adaptive reference: Dormand-Prince 5(4) of torchdiffeq on the probability flow."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver, SolverFacts, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

#: sigma / (alpha + sigma) at which integration ends: below it x0 hardly changes, and the slope is 0 / 0 at 0.
FLOOR = 1e-4
#: Evaluations of one step of the method.
STAGES = 6


def part_of_noise(noise: NoiseSchedule, t: Tensor) -> Tensor:
    """u = sigma / (alpha + sigma)."""
    sigma = noise.sigma(t)
    return sigma / (noise.alpha(t) + sigma)


@dataclass(frozen=True)
class Dopri5Solver(AdaptiveSolver):
    """dy/du = (y - x0) / u for y = x / (alpha + sigma) over u = sigma / (alpha + sigma): rectified flow's coordinates.

    Any family is smooth in them from u = 1 (no signal) on. The state is double precision; the denoiser sees x's own.
    The error is that of the worst sample, so a sample alone agrees with itself in a batch to the tolerance.
    """

    noise: NoiseSchedule
    tolerance: float
    limit: int
    facts = SolverFacts(order=5, evaluations=STAGES, adaptive=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        return self.solve(denoise, x, t, s, self.limit, rng), state

    def solve(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, budget: int, rng: SampleRng) -> Tensor:
        import torch
        from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]

        del rng
        if t.ndim:
            raise ConfigError("dopri5 has one time for all; use a schedule without per-group times")
        noise, first = self.noise, part_of_noise(self.noise, t)
        last = part_of_noise(noise, s).clamp(min=FLOOR)
        most, used = min(budget, self.limit), 0

        def time_of(u: Tensor) -> Tensor:
            if u >= first:
                return t
            return noise.time_at(2 * (torch.log1p(-u) - torch.log(u))) if u < 1 else torch.ones_like(t)

        def slope(u: Tensor, y: Tensor) -> Tensor:
            nonlocal used
            used += 1
            if used > most:
                raise ConfigError(
                    f"dopri5 needs more than its limit of {most} evaluations: use a larger tolerance than "
                    f"{self.tolerance}, or a larger limit"
                )
            u = u.double()
            now = time_of(u)
            scale = noise.alpha(now) + noise.sigma(now)
            return (y - denoise((y * scale).to(x.dtype), now).double()) / u

        def worst(error: Tensor) -> Tensor:
            return error.reshape(x.shape[0], -1).square().mean(1).sqrt().max()

        if first <= last:
            return transfer(noise, x, denoise(x, t), t, s)
        y = x.double() / (noise.alpha(t) + noise.sigma(t))
        # Without `step_t` it steps beyond the end, where there is no time, and interpolates.
        options = {"norm": worst, "step_t": last[None]}
        out: Any = odeint(
            slope, y, torch.stack([first, last]), rtol=self.tolerance, atol=self.tolerance, method="dopri5",
            options=options,
        )  # fmt: skip
        end = time_of(last)
        x_end = (out[-1] * (noise.alpha(end) + noise.sigma(end))).to(x.dtype)
        if part_of_noise(noise, s) >= last:
            return x_end
        return transfer(noise, x_end, denoise(x_end, end), end, s)

    def evaluations(self, steps: int) -> int:
        """The limit and one for the last transfer; how many are used depends on the tolerance, not on the steps."""
        del steps
        return self.limit + 1


@dataclass(frozen=True)
class Dopri5(Plugin):
    """Dormand & Prince 1980 by torchdiffeq, on the probability flow of Song 2021, eq. 13.

    Args:
        tolerance: relative and absolute.
        limit: evaluations after which it gives up.
    """

    tolerance: float = 1e-6
    limit: int = 10_000

    summary = "adaptive reference: Dormand-Prince 5(4) on the probability flow, to a tolerance"
    paper = "Score SDE (2011.13456), eq. 13; torchdiffeq"
    orders = "5"
    effects = frozenset({"adaptive-grid", "repeated-evaluations"})

    def __post_init__(self) -> None:
        if not 1e-12 <= self.tolerance <= 0.1:
            raise ConfigError(f"dopri5: tolerance = {self.tolerance}: expected a number from 1e-12 to 0.1")
        if self.limit < STAGES:
            raise ConfigError(f"dopri5: limit = {self.limit}: expected at least {STAGES}")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        try:
            importlib.import_module("torchdiffeq")
        except ImportError:
            raise ConfigError("dopri5 needs torchdiffeq: pip install 'efficient-diffusion-suite[solvers]'") from None
        return Dopri5Solver(noise, self.tolerance, self.limit)
