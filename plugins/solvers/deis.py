"""DEIS: Adams-Bashforth on epsilon, its polynomial in t, in rho = sigma / alpha or in log rho; Runge-Kutta in rho."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid, combine, of_times, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import (
    epsilon_weights,
    interpolated,
    is_regular,
    noise_step_weights,
    noise_weights,
    stopping_evaluations,
)
from suite.plugins.solvers._final import SHORT, limited, one_less, steps_left

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Variable = Literal["t", "rho", "log-rho", "rho-rk"]
ORDERS = (1, 2, 3, 4)
#: Gauss-Legendre points for the polynomial in t: its integrand is smooth, and 32 are exact to rounding.
QUADRATURE = 32


@of_times
def in_time(noise: NoiseSchedule, t: Tensor, s: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """tAB: x_s = (alpha_s / alpha_t) x + alpha_s int eps(t) d rho, rho = sigma / alpha, eps a polynomial in t.

    By parts, int r^k d rho = rho_s - int k r^(k-1) rho dr with r = (u - t) / (s - t): no derivative of the schedule.
    """
    import numpy as np
    import torch

    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(QUADRATURE))
    r, weights = (points + 1) / 2, weights / 2
    here = t[..., None] + (s - t)[..., None] * r
    rho = noise.sigma(here) / noise.alpha(here)
    rho_t, rho_s = noise.sigma(t) / noise.alpha(t), noise.sigma(s) / noise.alpha(s)
    moments = [rho_s - rho_t]
    moments += [rho_s - (weights * k * r ** (k - 1) * rho).sum(-1) for k in range(1, 1 + len(past))]
    nodes = torch.stack([(u - t) / (s - t) for u in (t, *past)], -1)
    out = noise.alpha(s)[..., None] * interpolated(nodes, torch.stack(moments, -1))
    return noise.alpha(s) / noise.alpha(t), *out.unbind(-1)


@of_times
def in_rho(noise: NoiseSchedule, t: Tensor, s: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """rhoAB, which k-diffusion calls LMS: eps a polynomial in rho, whose integral is a polynomial's."""
    import torch

    rho_t, *rhos = (noise.sigma(u) / noise.alpha(u) for u in (t, *past))
    h = noise.sigma(s) / noise.alpha(s) - rho_t
    nodes = torch.stack([torch.zeros_like(h), *((rho - rho_t) / h for rho in rhos)], -1)
    moments = torch.stack([h / (k + 1) for k in range(nodes.shape[-1])], -1)
    out = noise.alpha(s)[..., None] * interpolated(nodes, moments)
    return noise.alpha(s) / noise.alpha(t), *out.unbind(-1)


WEIGHTS: dict[str, Callable[..., tuple[Coefficient, ...]]] = {"t": in_time, "rho": in_rho, "log-rho": noise_weights}


@cache
def of_noise_parts(variable: str) -> Callable[..., tuple[Coefficient, ...]]:
    """The same weights for sigma eps = x - alpha x0 in the place of eps, which is an operation less to compute."""

    @of_times
    def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        import torch

        of_x, *of_epsilon = (torch.as_tensor(w, dtype=torch.float64) for w in WEIGHTS[variable](noise, t, s, *past))
        return of_x, *(w / noise.sigma(u) for w, u in zip(of_epsilon, (t, *past), strict=True))

    return weights


@of_times
def minus_alpha(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor]:
    """Weight of x0 in sigma eps."""
    return (-noise.alpha(t),)


@dataclass(frozen=True)
class _Past:
    """sigma eps of the evaluations before, newest first, and the steps left."""

    known: tuple[tuple[Tensor, Tensor], ...]
    left: int | None


@dataclass(frozen=True)
class DEISSolver(Solver):
    """epsilon is the polynomial through its last `order` values; the first steps have fewer, and the last of a short
    run too if wanted.

    From alpha = 0, where rho is infinite, the step is DDIM's; to sigma = 0 it is too in the variable log-rho.
    """

    noise: NoiseSchedule
    order: int
    variable: Variable
    lower_order_final: bool = False

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=self.order, multistep=self.order > 1)

    def begin(self, run: Run, times: Tensor) -> Any:
        """Nothing but the number of steps left, if it matters."""
        del run
        check_grid(self.facts, times)
        return _Past((), steps_left(times, self.lower_order_final, SHORT))

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, x0 = self.noise, denoise(x, t)
        known, left = (state.known, state.left) if state else ((), None)
        if not is_regular(noise, t):
            return transfer(noise, x, x0, t, s), _Past((), one_less(left))
        part = combine((1.0, *minus_alpha(noise, t)), (x, x0))
        past = _Past(((t, part), *known)[: self.order - 1], one_less(left))
        if not is_regular(noise, s):
            return transfer(noise, x, x0, t, s), past
        before = known[: limited(self.order, left) - 1]
        weights = of_noise_parts(self.variable)(noise, t, s, *(time for time, _ in before))
        return combine(weights, (x, part, *(value for _, value in before))), past


#: Butcher tableaus by order: for each stage after the first where it lies and its weights; then those of the step.
#: Heun's of order 2 (rho2Heun), Kutta's (rho3Kutta) and the classical one (rho4RK).
TABLEAUS: dict[int, tuple[tuple[tuple[float, tuple[float, ...]], ...], tuple[float, ...]]] = {
    1: ((), (1.0,)),
    2: (((1.0, (1.0,)),), (1 / 2, 1 / 2)),
    3: (((1 / 2, (1 / 2,)), (1.0, (-1.0, 2.0))), (1 / 6, 2 / 3, 1 / 6)),
    4: (((1 / 2, (1 / 2,)), (1 / 2, (0.0, 1 / 2)), (1.0, (0.0, 0.0, 1.0))), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@of_times
def at_part(noise: NoiseSchedule, t: Tensor, s: Tensor, part: Tensor | float) -> tuple[Tensor]:
    """The time whose rho lies at `part` of the way from that of t to that of s; s itself at 1."""
    import torch

    first, last = (noise.sigma(u) / noise.alpha(u) for u in (t, s))
    rho = first + part * (last - first)
    return (noise.time_at(-2 * torch.log(rho)) if part < 1 else s,)


@dataclass(frozen=True)
class RhoRKSolver(Solver):
    """rhoRK: y = x / alpha obeys dy / d rho = eps, and a classical Runge-Kutta method of `order` steps it.

    Next to alpha = 0 or sigma = 0, where a slope of the step is not known, the step is DDIM's with one evaluation.
    """

    noise: NoiseSchedule
    order: int

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=self.order, evaluations=self.order)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, x0 = self.noise, denoise(x, t)
        if self.order == 1 or not is_regular(noise, t, s):
            return transfer(noise, x, x0, t, s), state
        stages, last = TABLEAUS[self.order]
        slopes = [combine(epsilon_weights(noise, t), (x, x0))]
        for part, weights in stages:
            (value,) = at_part(noise, t, s, part)
            u = t.new_tensor(value) if isinstance(value, int | float) else value
            # The weights of a stage add up to where it lies, so this is DDIM's transfer to there by their mean.
            there = _straight(noise, x, t, u, [w / part for w in weights], slopes)
            slopes.append(combine(epsilon_weights(noise, u), (there, denoise(there, u))))
        return _straight(noise, x, t, s, last, slopes), state

    def evaluations(self, steps: int) -> int:
        """`order` a step, but 1 from alpha = 0 and 1 to sigma = 0."""
        return stopping_evaluations(self.noise, self.order, steps)


def _straight(
    noise: NoiseSchedule, x: Tensor, t: Tensor, to: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]
) -> Tensor:
    """DDIM's transfer with a mean of slopes in epsilon's place."""
    of_x, of_epsilon = noise_step_weights(noise, t, to)
    used = [(w, e) for w, e in zip(weights, slopes, strict=True) if w]
    return combine((of_x, *(of_epsilon * w for w, _ in used)), (x, *(e for _, e in used)))


@dataclass(frozen=True)
class DEIS(Plugin):
    """Zhang & Chen 2022, section 3.2.

    Args:
        order: evaluations that the polynomial goes through, 1 to 4; 1 is DDIM.
        variable: what the polynomial is in: `t` (tAB), `rho` = sigma / alpha (rhoAB, or LMS), or `log-rho`; or
            `rho-rk`, no polynomial but `order` evaluations a step, by Runge-Kutta in rho (rhoRK).
        lower_order_final: in runs of fewer than 15 steps the last step goes through one evaluation, the one before
            through two and so on, as in diffusers. Of `rho-rk` it changes nothing.
    """

    order: int = 3
    variable: Variable = "t"
    lower_order_final: bool = True

    summary = "DEIS of order 1 to 4: Adams-Bashforth on epsilon in t, rho (LMS) or log rho, or Runge-Kutta in rho"
    paper = "DEIS (2204.13902), section 3.2; rhoRK: section 4"
    orders = "1-4"
    bench_options = ({"order": 2}, {"order": 3})

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"deis: order = {self.order}: expected 1, 2, 3 or 4")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        word = "repeated-evaluations" if self.variable == "rho-rk" else "multistep"
        return frozenset({word}) if self.order > 1 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        if self.variable == "rho-rk":
            return RhoRKSolver(noise, self.order)
        return DEISSolver(noise, self.order, self.variable, self.lower_order_final)
