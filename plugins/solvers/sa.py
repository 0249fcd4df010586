"""SA-Solver: stochastic Adams predictor and corrector on a family of SDEs between the ODE and twice its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid, combine, of_times, transfer_weights
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import interpolated, is_regular, moments
from suite.plugins.solvers._final import limited, one_less, steps_left
from suite.plugins.solvers._stochastic import posterior_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.host.models import ModelFolder
    from suite.recipe import Recipe
    from suite.run import Run

ORDERS = (1, 2, 3, 4)
#: Fewest steps in which a predictor of that order is steady with noise; None is never. With fewer its extrapolation
#: feeds noise back: samples of narrow data come out up to 4.5 times as wide in 10 steps, and of order 4 on even times
#: still 1.9 times in 100 (tests/plugins/test_final_orders.py).
STEADY: dict[int, int | None] = {3: 20, 4: None}


@of_times
def adams_weights(
    noise: NoiseSchedule, adjusted: Tensor | bool, tau: Tensor, t: Tensor, s: Tensor, *nodes: Tensor
) -> tuple[Tensor, ...]:
    """Weights of x, of noise, and of x0 at each of `nodes`, for the step from t to s (Xue 2023, proposition 4.2).

    With k = 1 + tau^2: x_s = (sigma_s / sigma_t) e^(-tau^2 h) x + alpha_s int_0^h k e^(-k (h - u)) x0 du
    + sigma_s sqrt(1 - e^(-2 tau^2 h)) z, x0 the polynomial through the nodes. Adjusted, a straight line's slope is
    weighed by k h / 2, the integral without its kernel, as the authors' code does.
    """
    import torch

    lam_t = noise.log_snr(t) / 2
    h = noise.log_snr(s) / 2 - lam_t
    r = torch.stack([(noise.log_snr(u) / 2 - lam_t) / h for u in nodes], -1)
    integrals = moments((1 + tau**2) * h, len(nodes), -1)
    if adjusted and len(nodes) == 2:
        integrals = torch.stack([integrals[..., 0], (1 + tau**2) * h / 2], -1)
    of_x0 = noise.alpha(s)[..., None] * interpolated(r, integrals)
    of_x = noise.sigma(s) / noise.sigma(t) * torch.exp(-(tau**2) * h)
    return of_x, noise.sigma(s) * torch.sqrt(-torch.expm1(-2 * tau**2 * h)), *of_x0.unbind(-1)


@of_times
def end_weights(noise: NoiseSchedule, tau: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """The limit of the first-order step at alpha_t = 0 or sigma_s = 0: weights of x, noise and x0."""
    import torch

    of_x, of_x0, fresh = (torch.as_tensor(w, dtype=torch.float64) for w in posterior_weights(noise, t, s))
    of_x_ode, of_x0_ode = (torch.as_tensor(w, dtype=torch.float64) for w in transfer_weights(noise, t, s))
    noisy = tau > 0
    return of_x.where(noisy, of_x_ode), fresh.where(noisy, 0.0), of_x0.where(noisy, of_x0_ode)


@dataclass(frozen=True)
class _Past:
    """The step before: where it began, its noise and tau, and the evaluations up to there, newest first.

    Attributes:
        corrector: evaluations that the correction of that step may go through.
        left: steps left.
    """

    x: Tensor | None = None
    z: Tensor | None = None
    tau: Tensor | None = None
    known: tuple[tuple[Tensor, Tensor], ...] = ()
    corrector: int = 0
    left: int | None = None


@dataclass(frozen=True)
class SASolver(Solver):
    """Each evaluation first corrects the step that led to it, with that step's noise, then predicts the next one.

    tau is 1 for the reverse SDE and 0 for the probability flow. The corrected step's order is that of the corrector,
    at most one more than the predictor's; where tau > 0 the law of the samples is of order 2 at most. Next to
    alpha = 0 or sigma = 0 the step is of first order and nothing is corrected.
    """

    noise: NoiseSchedule
    order: int
    corrector: int
    tau: float
    interval: tuple[float, float]
    adjusted: bool
    lower_order_final: bool = False

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        order = min(self.corrector, self.order + 1) if self.corrector else self.order
        order = min(order, 2) if self.tau > 0 or self.lower_order_final else order
        return SolverFacts(order, stochastic=self.tau > 0, multistep=self.order > 1 or self.corrector > 0)

    def begin(self, run: Run, times: Tensor) -> Any:
        """Nothing but the number of steps left, if it matters."""
        del run
        check_grid(self.facts, times)
        return _Past(left=steps_left(times, self.lower_order_final))

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        noise, x0, left = self.noise, denoise(x, t), state.left if state else None
        nothing = _Past(left=one_less(left))
        low, high = self.interval
        tau = self.tau * ((t >= low) & (t <= high)).double()
        z = rng.normal_like(x) if self.tau > 0 else x.new_zeros(())
        if not is_regular(noise, t):
            return combine(end_weights(noise, tau, t, s), (x, z, x0)), nothing
        past: tuple[tuple[Tensor, Tensor], ...] = ()
        if state and state.known:
            past = state.known
            if self.corrector:
                nodes, values = zip(*((t, x0), *past)[: state.corrector], strict=True)
                weights = adams_weights(noise, self.adjusted, state.tau, past[0][0], t, *nodes)
                x = combine(weights, (state.x, state.z, *values))
        known = ((t, x0), *past)[: max(self.order, self.corrector - 1)]
        if not is_regular(noise, s):
            return combine(end_weights(noise, tau, t, s), (x, z, x0)), nothing
        nodes, values = zip(*known[: limited(self.order, left)], strict=True)
        x_s = combine(adams_weights(noise, self.adjusted, tau, t, s, *nodes), (x, z, *values))
        corrector = limited(self.corrector, None if left is None else left + 1)
        return x_s, _Past(x, z, tau, known, corrector, one_less(left))


@dataclass(frozen=True)
class SA(Plugin):
    """Xue 2023, algorithm 1, with data prediction.

    Args:
        order: of the predictor, 1 to 4; with noise 3 wants 20 steps, and 4 is refused.
        corrector: evaluations that the corrector goes through, the new one included; 0 is none.
        tau: how much noise: 0 is the probability flow, 1 the reverse SDE.
        low, high: times between which tau is that; outside it is 0.
        adjusted: the authors' own weights of second order, which differ by a term of third order in the step.
        lower_order_final: with s steps left predict through at most s evaluations and correct through s + 1, diffusers'
            default; the whole is of second order at most, and with noise less than that on some schedules.
    """

    order: int = 2
    corrector: int = 2
    tau: float = 1.0
    low: float = 0.2
    high: float = 0.8
    adjusted: bool = False
    lower_order_final: bool = False

    summary = "SA-Solver: stochastic Adams predictor and corrector; order 2 in law, higher where tau = 0"
    paper = "SA-Solver (2305.14267), algorithm 1"
    orders = "1-4"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"sa: order = {self.order}: expected 1, 2, 3 or 4")
        if self.corrector not in (0, *ORDERS):
            raise ConfigError(f"sa: corrector = {self.corrector}: expected 0 (none), 1, 2, 3 or 4")
        if not 0 <= self.tau <= 2:
            raise ConfigError(f"sa: tau = {self.tau}: expected a number from 0 (no noise) to 2")
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"sa: low = {self.low}, high = {self.high}: expected 0 <= low <= high <= 1")

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        words = {"stochastic-step": self.tau > 0, "multistep": self.order > 1 or self.corrector > 0}
        return frozenset(word for word, true in words.items() if true)

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        del folder
        self._refuse_unsteady(recipe.steps or 0)

    def _refuse_unsteady(self, steps: int) -> None:
        fewest = STEADY.get(self.order, 0)
        if self.tau > 0 and (fewest is None or steps < fewest):
            or_steps = f", or {fewest} steps" if fewest else ""
            raise ConfigError(
                f"sa: order = {self.order} with noise (tau = {self.tau:g}) in {steps} steps: it is not steady, and "
                f"samples come out several times as wide as the data; take sa:order=2, which is of order 2 in law as "
                f"this is{or_steps}, or tau=0"
            )

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        self._refuse_unsteady(run.steps)
        return SASolver(
            noise, self.order, self.corrector, self.tau, (self.low, self.high), self.adjusted, self.lower_order_final
        )
