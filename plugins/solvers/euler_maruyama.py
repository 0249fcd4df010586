"""Euler-Maruyama on the reverse SDE, in the time or as the forward chain is discretised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._stochastic import forward_weights, posterior_weights, rates

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

Form = Literal["reverse-diffusion", "time"]


@of_times
def reverse_diffusion_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """x_s = (2 - a) x + G^2 score + G z, a and G those of the forward step from s to t (Song 2021, eq. 46)."""
    import torch

    keep, spread = (torch.as_tensor(w, dtype=torch.float64) for w in forward_weights(noise, s, t))
    pull = (spread / noise.sigma(t)) ** 2  # the score is -(x - alpha x0) / sigma^2
    return 2 - keep - pull, pull * noise.alpha(t), spread


@of_times
def time_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """x_s = x - (t - s) (f x - g^2 score) + g sqrt(t - s) z."""
    f, g2 = rates(noise, t)
    step = t - s
    pull = step * g2 / noise.sigma(t) ** 2
    return 1 - step * f - pull, pull * noise.alpha(t), (step * g2).sqrt()


@dataclass(frozen=True)
class EulerMaruyamaSolver(Solver):
    """The reverse SDE dx = (f x - g^2 score) dt + g dw by its coefficients at the beginning of the step.

    From alpha = 0, where f is infinite, and to sigma = 0, the step is the ancestral one, whose limit for small steps
    this is; so the last step adds no noise.
    """

    noise: NoiseSchedule
    form: Form
    facts = SolverFacts(order=1, stochastic=True, exact=False, min_steps=3)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        weights = reverse_diffusion_weights if self.form == "reverse-diffusion" else time_weights
        if not is_regular(self.noise, t, s):
            weights = posterior_weights
        return combine(weights(self.noise, t, s), (x, denoise(x, t), rng.normal_like(x))), state


@dataclass(frozen=True)
class EulerMaruyama(Plugin):
    """Song 2021, eq. 6 and appendix E, for any continuous noise schedule.

    Args:
        form: `reverse-diffusion` discretises as the forward chain is, and is stable at any step; `time` is
            Euler-Maruyama in t by the schedule's derivatives, and wants small steps.
    """

    form: Form = "reverse-diffusion"

    summary = "Euler-Maruyama on the reverse SDE, weak order 1"
    paper = "Score SDE (2011.13456), eq. 6, 46"
    orders = "1"
    effects = frozenset({"stochastic-step"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return EulerMaruyamaSolver(noise, self.form)
