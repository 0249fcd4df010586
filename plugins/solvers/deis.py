"""DEIS: Adams-Bashforth on epsilon, its polynomial in t, in sigma / alpha, or in its logarithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import epsilon_weights, interpolated, is_regular, noise_weights
from suite.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer

if TYPE_CHECKING:
    from torch import Tensor

    from suite.coefficients import Coefficient
    from suite.noise import NoiseSchedule
    from suite.rng import SampleRng
    from suite.run import Run

Variable = Literal["t", "rho", "log-rho"]
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


@dataclass(frozen=True)
class DEISSolver(Solver):
    """epsilon is the polynomial through its last `order` values; the first steps have fewer.

    From alpha = 0, where rho is infinite, the step is DDIM's; to sigma = 0 it is too in the variable log-rho.
    """

    noise: NoiseSchedule
    order: int
    variable: Variable

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=self.order, multistep=self.order > 1)

    def init(self, run: Run) -> Any:
        del run
        return ()

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, x0 = self.noise, denoise(x, t)
        if not is_regular(noise, t):
            return transfer(noise, x, x0, t, s), ()
        epsilon = combine(epsilon_weights(noise, t), (x, x0))
        known = ((t, epsilon), *state)[: self.order - 1]
        if not is_regular(noise, s):
            return transfer(noise, x, x0, t, s), known
        weights = WEIGHTS[self.variable](noise, t, s, *(time for time, _ in state))
        return combine(weights, (x, epsilon, *(value for _, value in state))), known


@dataclass(frozen=True)
class DEIS(Plugin):
    """Zhang & Chen 2022, section 3.2.

    Args:
        order: evaluations that the polynomial goes through, 1 to 4; 1 is DDIM.
        variable: what the polynomial is in: `t` (tAB), `rho` = sigma / alpha (rhoAB, or LMS), or `log-rho`.
    """

    order: int = 3
    variable: Variable = "t"

    summary = "DEIS: Adams-Bashforth of order 1 to 4 on epsilon, in t (tAB), rho (rhoAB, LMS) or log rho"
    paper = "DEIS (2204.13902), section 3.2"
    orders = "1-4"
    lossless = True
    bench_options = ({"order": 2}, {"order": 3})

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"deis: order = {self.order}: expected 1, 2, 3 or 4")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"multistep"}) if self.order > 1 else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return DEISSolver(noise, self.order, self.variable)
