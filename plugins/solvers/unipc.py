"""UniPC: a multistep predictor, and a corrector that costs no evaluation of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid, combine, of_times, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import interpolated, is_regular, phi
from suite.plugins.solvers._final import limited, one_less, steps_left

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Variant = Literal["bh1", "bh2"]
ORDERS = (1, 2, 3)


@cache
def unified(variant: str) -> Callable[..., tuple[Coefficient, ...]]:
    """Weights of (x at t, x0 at t, x0 at each other time) for the step from t to s (Zhao 2023, theorem 3.1).

    The other times are those of past evaluations for the predictor, and also s itself for the corrector. With
    r_m = (lam_m - lam_t) / h and D_m = (x0_m - x0_t) / r_m,

        x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) x0_t - alpha_s B(h) sum_m rho_m D_m,

    rho solving sum_m rho_m r_m^(k-1) = k! h phi_(k+1)(-h) / B(h). B(h) is -h (bh1) or e^-h - 1 (bh2). It cancels but
    where a single rho is set to 1/2 instead, which the paper advises and which is of the same order.
    """

    @of_times
    def weights(noise: NoiseSchedule, t: Tensor, s: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        import torch

        lam_t = noise.log_snr(t) / 2
        h = noise.log_snr(s) / 2 - lam_t
        of_x, alpha = noise.sigma(s) / noise.sigma(t), noise.alpha(s)
        of_x0 = -alpha * torch.expm1(-h)
        if not others:
            return of_x, of_x0
        base = -h if variant == "bh1" else torch.expm1(-h)
        r = torch.stack([(noise.log_snr(u) / 2 - lam_t) / h for u in others], -1)
        if len(others) == 1:
            rho = torch.full_like(r, 0.5)
        else:
            factorials, moments = 1, []
            for k in range(1, 1 + len(others)):
                factorials *= k
                moments.append(-factorials * h * phi(k + 1, -h) / base)
            rho = interpolated(r, torch.stack(moments, -1))
        of_others = -(alpha * base)[..., None] * rho / r
        return of_x, of_x0 - of_others.sum(-1), *of_others.unbind(-1)

    return weights


@dataclass(frozen=True)
class _Past:
    """The step before: where it began, and the evaluations up to there, newest first; and the steps left."""

    x: Tensor | None
    known: tuple[tuple[Tensor, Tensor], ...]
    left: int | None


@dataclass(frozen=True)
class UniPCSolver(Solver):
    """Each evaluation first corrects the step that led to it, then predicts the next one.

    Without the corrector it is UniP, of order p; with it of order p + 1, by the same number of evaluations. The
    first steps have less history. Next to alpha = 0 or sigma = 0, where half log-SNR is infinite, the step is
    DDIM's and nothing is corrected. With lower orders in the last steps the last is DDIM's wherever it ends, and the
    whole of second order at most.
    """

    noise: NoiseSchedule
    order: int
    variant: Variant
    corrector: bool
    lower_order_final: bool = False

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        order = self.order + self.corrector
        order = min(order, 2) if self.lower_order_final else order
        return SolverFacts(order, multistep=self.order > 1 or self.corrector)

    def begin(self, run: Run, times: Tensor) -> Any:
        """Nothing but the number of steps left, if it matters."""
        del run
        check_grid(self.facts, times)
        return _Past(None, (), steps_left(times, self.lower_order_final))

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        noise, weights = self.noise, unified(self.variant)
        x0, left = denoise(x, t), state.left if state else None
        nothing = _Past(None, (), one_less(left))
        if not is_regular(noise, t):
            return transfer(noise, x, x0, t, s), nothing
        past: tuple[tuple[Tensor, Tensor], ...] = ()
        if state and state.known:
            past = state.known
            if self.corrector:
                (begun, first), *older = past
                times, values = (tuple(u) for u in zip(*older, strict=True)) if older else ((), ())
                x = combine(weights(noise, begun, t, *times, t), (state.x, first, *values, x0))
        known = ((t, x0), *past)[: limited(self.order, left)]
        if not is_regular(noise, s):
            return transfer(noise, x, x0, t, s), nothing
        times, values = (tuple(u) for u in zip(*known, strict=True))
        return combine(weights(noise, t, s, *times[1:]), (x, *values)), _Past(x, known, one_less(left))


@dataclass(frozen=True)
class UniPC(Plugin):
    """Zhao 2023, algorithms 1 and 2, with data prediction.

    Args:
        order: of the predictor, 1 to 3; the corrector adds one.
        variant: the function B(h): bh1 is h, bh2 is e^h - 1.
        corrector: correct each step with the evaluation that follows it.
        lower_order_final: the step before the last is of order 2 at most and the last of order 1, as in diffusers;
            it is steadier, and the whole of second order at most.
    """

    order: int = 2
    variant: Variant = "bh2"
    corrector: bool = True
    lower_order_final: bool = True

    summary = "UniPC of order 1 to 3 with its free corrector, or UniP without"
    paper = "UniPC (2302.04867), algorithms 1, 2"
    orders = "1-4"
    bench_options = ({"order": 2}, {"order": 3})

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"unipc: order = {self.order}: expected 1, 2 or 3")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"multistep"}) if self.order > 1 or self.corrector else frozenset()

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return UniPCSolver(noise, self.order, self.variant, self.corrector, self.lower_order_final)
