"""GENIE: the second term of the Taylor series of the flow, with the network's own directional derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, combine, of_times, transfer, transfer_weights
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._exponential import is_regular
from suite.plugins.solvers._stochastic import rates

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@of_times
def flow_weights(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor, ...]:
    """Along the flow, for each unit of rho: weights of x and x0 in dx, and dt."""
    f, g2 = rates(noise, t)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    # d rho / dt = rho g^2 / (2 sigma^2), and dx = (f x + g^2 eps / (2 sigma)) dt with eps = (x - alpha x0) / sigma.
    pace = sigma / alpha * g2 / (2 * sigma**2)
    pull = g2 / (2 * sigma**2 * pace)
    return f / pace + pull, -pull * alpha, 1 / pace


@of_times
def step_weights(noise: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Weights of x, x0 and d x0 / d rho; d eps / d rho is -1 / rho of that."""
    of_x, of_x0 = (torch_value(w) for w in transfer_weights(noise, t, s))
    rho = noise.sigma(t) / noise.alpha(t)
    h = noise.sigma(s) / noise.alpha(s) - rho
    return of_x, of_x0, -noise.alpha(s) * h**2 / (2 * rho)


def torch_value(weight: Coefficient) -> Tensor:
    """A weight as a float64 tensor, whether it was looked up or computed."""
    import torch

    return torch.as_tensor(weight, dtype=torch.float64)


@dataclass(frozen=True)
class GENIESolver(Solver):
    """y_s = y + h eps + h^2 / 2 d eps / d rho for y = x / alpha over rho = sigma / alpha, where dy / d rho = eps.

    The derivative along the flow is exact: one evaluation in forward mode, in the direction (eps, dt / d rho), after
    the one that gives eps. The paper distils it into a small head instead, which costs no evaluation. Next to
    alpha = 0 or sigma = 0 the step is DDIM's.
    """

    noise: NoiseSchedule
    facts = SolverFacts(order=2, evaluations=2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        import warnings

        import torch
        import torch.autograd.forward_ad as forward
        from torch.nn.attention import SDPBackend, sdpa_kernel

        del rng
        noise, x0 = self.noise, denoise(x, t)
        if not is_regular(noise, t, s):
            return transfer(noise, x, x0, t, s), state
        *along, pace = flow_weights(noise, t)
        # The engine samples in inference mode, where there is no differentiation either.
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward.dual_level():
            x, x0 = x.clone(), x0.clone()
            with warnings.catch_warnings():  # torch's own, when it first loads the rules of forward mode
                warnings.simplefilter("ignore", DeprecationWarning)
                dual = forward.make_dual(x, combine(along, (x, x0)))
            # A time for each sample: coefficients at a time that all share are looked up, and have no derivative.
            many = t if t.ndim else t.expand(x.shape[0])
            time = forward.make_dual(many.clone(), torch_value(pace).expand_as(many).clone())
            answer = forward.unpack_dual(denoise(dual, time)).tangent
            change = torch.zeros_like(x) if answer is None else answer
        # eps = (y - x0) / rho with dy = eps d rho: the two terms of eps cancel, and - d x0 / rho is left of d eps.
        return combine(step_weights(noise, t, s), (x, x0, change)), state

    def evaluations(self, steps: int) -> int:
        """2 a step, but 1 from alpha = 0 and 1 to sigma = 0."""
        from suite.plugins.solvers._exponential import stopping_evaluations

        return stopping_evaluations(self.noise, 2, steps)


@dataclass(frozen=True)
class GENIE(Plugin):
    """Dockhorn 2022, eq. 10, with the exact derivative in place of the distilled head.

    It needs a network that forward mode goes through: no quantised layers, no caches.
    """

    summary = "GENIE: second-order Taylor step by the network's exact directional derivative"
    paper = "GENIE (2210.05475), eq. 10"
    orders = "2"
    effects = frozenset({"repeated-evaluations"})

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return GENIESolver(noise)
