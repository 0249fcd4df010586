"""`Solver`: one step from time t to time s. It owns no grid and keeps no state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from suite.diffusion.coefficients import combine, expand, of_times
from suite.errors import ConfigError

if TYPE_CHECKING:  # a plugin's module must load without torch, so that listing it is cheap
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


class Denoise(Protocol):
    """The denoiser as a solver sees it: guidance, conditioning and bookkeeping are the engine's."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 = E[x0 given x_t = x], same shape as x; for tokens p(x0 given x_t), [B, L, V]."""
        ...


@dataclass(frozen=True)
class SolverFacts:
    """What the engine and the rules must know about a solver.

    Attributes:
        order: global order of convergence on a smooth problem.
        evaluations: denoiser evaluations in a full step; the last step may need fewer.
        stochastic: draws noise during the run.
        multistep: carries past evaluations in its state.
        adaptive: picks its own times; implements `solve` instead of `step`.
        discrete: steps tokens, not real vectors.
        variable: how often it evaluates depends on the data; `evaluations` says the most.
        min_steps: fewest steps for which it works.
        exact: a step is exact, in law, where x0 is known: the linear part is not discretised.
        affine: on an affine denoiser a step is affine in x and in its noise, so that mean and variance of its
            samples follow without sampling.

    An order of 0 says that finer grids do not converge to the data: a bias stays, as that of Langevin steps of a
    given size does.
    """

    order: int
    evaluations: int = 1
    stochastic: bool = False
    multistep: bool = False
    adaptive: bool = False
    discrete: bool = False
    variable: bool = False
    min_steps: int = 1
    exact: bool = True
    affine: bool = True

    @property
    def words(self) -> frozenset[str]:
        """These facts as effect words, for rules."""
        words = {
            "stochastic-step": self.stochastic,
            "multistep": self.multistep,
            "adaptive-grid": self.adaptive,
            "repeated-evaluations": self.evaluations > 1,
            "variable-evaluations": self.variable,
        }
        return frozenset(w for w, true in words.items() if true)


class Solver(ABC):
    """What the `solver` hook returns: a value made for one noise schedule."""

    facts: SolverFacts

    def init(self, run: Run) -> Any:
        """The state before the first step; None for one-step solvers."""
        del run

    def begin(self, run: Run, times: Tensor) -> Any:
        """The state before a run over the grid `times`, [steps + 1] or [steps + 1, groups].

        By default what `init` returns. A solver that must know the whole grid beforehand has its own.

        Raises:
            ConfigError: a grid that it cannot take.
        """
        check_grid(self.facts, times)
        return self.init(run)

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        """From x at time t to x at time s < t.

        Args:
            denoise: called once or more, at times of the solver's choice in [s, t].
            x: float32 [B, ...]; t, s: float64, scalar or [B] or [B, groups].
            state: what `init` or the step before returned.
            rng: one stream a sample.

        Returns:
            (x at s, new state). The old state is never changed in place.
        """

    def evaluations(self, steps: int) -> int:
        """Denoiser evaluations of a whole run of `steps` steps; the most, if they depend on the data."""
        return self.facts.evaluations * steps


class AdaptiveSolver(Solver):
    """A solver that picks its own times: the engine hands it the interval and a budget."""

    @abstractmethod
    def solve(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, budget: int, rng: SampleRng) -> Tensor:
        """From x at time t to x at time s with at most `budget` evaluations."""


def check_grid(facts: SolverFacts, times: Tensor) -> None:
    """Refuse a grid that no solver of these facts can take, before anything is evaluated.

    Raises:
        ConfigError: too few steps, times outside [0, 1], or a step in which no time decreases or one increases.
    """
    steps = times.shape[0] - 1
    if steps < facts.min_steps:
        raise ConfigError(f"the solver needs at least {facts.min_steps} steps; got {steps}: take more steps")
    if not times.isfinite().all() or times.min() < 0 or times.max() > 1:
        raise ConfigError(
            f"times outside [0, 1]: {times.flatten().tolist()[:8]}; a grid runs from 1 (noise) to 0 (data)"
        )
    columns = times.reshape(steps + 1, -1)
    if (columns[1:] > columns[:-1]).any() or not (columns[1:] < columns[:-1]).any(dim=1).all():
        raise ConfigError(
            f"times that do not decrease: {times.flatten().tolist()[:8]}; expected 1 to 0, like 1, 0.5, 0"
        )


def transfer(noise: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s x0 + sigma_s eps with the eps that x and x0 imply: DDIM, k-diffusion's Euler and flow Euler at once.

    Written as (sigma_s/sigma_t) x + (alpha_s - alpha_t sigma_s/sigma_t) x0, which has no singularity at
    alpha_t = 0 nor at sigma_s = 0. Needs sigma_t > 0.
    """
    return combine(transfer_weights(noise, t, s), (x, x0))


@of_times
def transfer_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What `transfer` multiplies x and x0 by."""
    ratio = noise.sigma(s) / noise.sigma(t)
    return ratio, noise.alpha(s) - noise.alpha(t) * ratio


__all__ = [
    "AdaptiveSolver", "Denoise", "Solver", "SolverFacts", "check_grid", "combine", "expand", "of_times", "transfer",
    "transfer_weights",
]  # fmt: skip
