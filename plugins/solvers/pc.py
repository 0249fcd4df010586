"""Predictor-corrector sampling: a step of the reverse SDE, then Langevin steps at the noise level it reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, expand, of_times
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import epsilon_weights, is_regular
from suite.plugins.solvers._langevin import langevin
from suite.plugins.solvers._stochastic import posterior_weights
from suite.plugins.solvers.euler_maruyama import reverse_diffusion_weights

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Predictor = Literal["reverse-diffusion", "ancestral"]
Norms = Literal["expected", "measured"]


@of_times
def damping(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor]:
    """The factor of the step size: that of the forward step from s to t, squared (1 for VE, 1 - beta for VP)."""
    return ((noise.alpha(t) / noise.alpha(s)) ** 2,)


@dataclass(frozen=True)
class PCSolver(Solver):
    """Predict x_s, then `corrections` times x + e score + sqrt(2 e) z with e = 2 a (snr |z| / |score|)^2.

    The norms are `expected`, |z| / |score| = sigma_s, or `measured` for each sample. The paper measures their means
    over a batch, which makes a sample depend on its neighbours. From alpha = 0 the predictor is the ancestral step
    and the corrector's a is 1; after the step to sigma = 0 there is nothing to correct. Langevin steps leave the
    variance (snr sigma_s)^2 too large however fine the grid is, which vanishes with sigma_s: order 1 down to there.
    """

    noise: NoiseSchedule
    predictor: Predictor
    corrections: int
    snr: float
    norms: Norms

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        exact = self.predictor == "ancestral" and not self.corrections
        affine = not (self.corrections and self.norms == "measured")
        return SolverFacts(1, 1 + self.corrections, stochastic=True, min_steps=3, exact=exact, affine=affine)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        noise, regular = self.noise, is_regular(self.noise, t, s)
        as_forward = self.predictor == "reverse-diffusion" and regular
        weights = reverse_diffusion_weights if as_forward else posterior_weights
        x = combine(weights(noise, t, s), (x, denoise(x, t), rng.normal_like(x)))
        if not is_regular(noise, s):
            return x, state
        (a,) = damping(noise, t, s) if regular else (1.0,)
        for _ in range(self.corrections):
            x = self._correct(denoise, x, s, a, rng)
        return x, state

    def _correct(self, denoise: Denoise, x: Tensor, s: Tensor, a: Coefficient, rng: SampleRng) -> Tensor:
        if self.norms == "expected":
            return langevin(self.noise, denoise, x, s, 2 * a * self.snr**2, rng)
        epsilon = combine(epsilon_weights(self.noise, s), (x, denoise(x, s)))
        z = rng.normal_like(x)
        axes = tuple(range(1, x.ndim))
        ratio = (z.square().sum(axes, keepdim=True) / epsilon.square().sum(axes, keepdim=True)).sqrt()
        # e / sigma^2, with score = -epsilon / sigma.
        size = 2 * (a if isinstance(a, int | float) else expand(a, x)) * (self.snr * ratio) ** 2
        sigma = expand(self.noise.sigma(s), x)
        return x - size * sigma * epsilon + (2 * size).sqrt() * sigma * z

    def evaluations(self, steps: int) -> int:
        """1 + corrections a step, but 1 to sigma = 0."""
        to_clean = float(self.noise.sigma(0.0)) == 0
        return steps + self.corrections * (steps - to_clean)


@dataclass(frozen=True)
class PC(Plugin):
    """Song 2021, algorithms 2 to 5, for any continuous noise schedule.

    Args:
        predictor: `reverse-diffusion` or `ancestral`.
        corrections: Langevin steps after each prediction; 0 leaves the predictor alone.
        snr: size of a Langevin step; 0.16 is the paper's for VE and CIFAR-10, 0.01 and less for VP.
        norms: `expected` takes |z| / |score| from the schedule, `measured` from each sample.
    """

    predictor: Predictor = "reverse-diffusion"
    corrections: int = 1
    snr: float = 0.16
    norms: Norms = "expected"

    summary = "predictor-corrector of Score SDE: reverse SDE and Langevin steps"
    paper = "Score SDE (2011.13456), algorithms 2 to 5"
    orders = "1"
    effects = frozenset({"stochastic-step", "repeated-evaluations"})

    def __post_init__(self) -> None:
        if not 0 <= self.corrections <= 100:
            raise ConfigError(f"pc: corrections = {self.corrections}: expected a whole number from 0 to 100")
        if not 0 < self.snr <= 0.5:
            raise ConfigError(f"pc: snr = {self.snr}: expected a number above 0, up to 0.5")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return PCSolver(noise, self.predictor, self.corrections, self.snr, self.norms)
