"""What theory says about reuse, on a network whose answer is known: equality with fewer steps, and a bound.

The network is one attention that gives the exact velocity or noise of Gaussian data, so `fora` on it is reuse of the
whole output.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.call import active_call
from suite.diffusion.denoiser import Cond, Counter, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Cosine, Flow, NoiseSchedule, VPLinear
from suite.diffusion.prediction import Prediction, from_x0
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.network import Network
from suite.plugins.cache.fora import FORA
from suite.plugins.solvers.ddim import DDIM
from suite.run import Run
from suite.testing import Gaussian

MEAN, VARIANCE = 0.7, 0.25


class Exact(nn.Module):
    """x0 = E[x0 given x_t] of N(0.7, 0.25), as epsilon or as flow's velocity."""

    def __init__(self, noise: NoiseSchedule, prediction: Prediction) -> None:
        super().__init__()
        self.to_q = nn.Identity()  # by this the host knows an attention
        self.noise, self.prediction, self.seen = noise, prediction, []

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tensor(active_call().t, dtype=torch.float64)
        self.seen.append((float(t), x))
        x0 = Gaussian(MEAN, VARIANCE).denoiser(self.noise)(x, t)
        if self.prediction is Prediction.FLOW:
            return (x - x0) / t
        return from_x0(self.prediction, x0, x, self.noise.alpha(t), self.noise.sigma(t))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.attn = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


@dataclass(frozen=True)
class Out:
    x0: Tensor
    evaluated: list[tuple[float, Tensor]]


def generate(noise: NoiseSchedule, prediction: Prediction, times: Tensor, interval: int = 1) -> Out:
    """A run over these times in float64."""
    exact = Exact(noise, prediction)
    module = Around(exact)
    steps = len(times) - 1
    run = Run("image", "exact", steps=steps, run_id="bounds")
    wrap = FORA(interval).cache(Network(module), run)
    if wrap.network:
        wrap.network(module)

    def forward(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return module(x)

    denoiser = NetworkDenoiser(module, forward, noise, prediction, torch.float64, Counter())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * float(noise.sigma(times[0]))
    solver: Any = DDIM().solver(noise, run)
    problem = Problem(x, times, Guidance().wrap(denoiser), {"cond": {}}, solver, noise, SampleRng([0] * len(x)), run)
    return Out(march(problem), exact.seen)


def even(steps: int) -> Tensor:
    # Epsilon says nothing about x0 where alpha is 0.
    return torch.linspace(0.98, 0.0, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("noise", [VPLinear(), Cosine(), Flow()], ids=lambda n: n.family)
@pytest.mark.parametrize("interval", [2, 4, 10])
def test_reuse_of_epsilon_is_ddim_with_fewer_steps(noise: NoiseSchedule, interval: int) -> None:
    """C1: reuse of the whole output over N steps is exactly the run with n/N steps: it gains nothing over it."""
    times = even(40)
    cached = generate(noise, Prediction.EPSILON, times, interval)
    fewer = generate(noise, Prediction.EPSILON, times[::interval])
    plain = generate(noise, Prediction.EPSILON, times)
    assert len(cached.evaluated) == len(fewer.evaluated) == 40 // interval
    torch.testing.assert_close(cached.x0, fewer.x0, rtol=0, atol=1e-12)
    assert float((plain.x0 - fewer.x0).abs().max()) > 1e-3, "or equality would say nothing"


def slope(t: Tensor) -> Tensor:
    """d v / d x of the flow of N(m, s^2): (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2)."""
    return (t - (1 - t) * VARIANCE) / ((1 - t) ** 2 * VARIANCE + t**2)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return slope(t) * (x - (1 - t) * MEAN) - MEAN


@pytest.mark.parametrize("steps", [24, 96])
@pytest.mark.parametrize("interval", [2, 3, 6])
def test_the_error_of_reuse_is_bounded(steps: int, interval: int) -> None:
    """Against the plain run on the same grid, |x0' - x0| <= (N - 1) h (L V + W) ((1 + h L)^n - 1) / L.

    L and W bound the velocity's derivatives in x and t over the states visited, V the velocity. What is reused is at
    most N - 1 steps old, in which x moved by at most (N - 1) h V: so it is off by (N - 1) h (L V + W) at most, and
    Gronwall's inequality sums that up.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    cached, plain = (generate(Flow(), Prediction.FLOW, times, n) for n in (interval, 1))
    for t, x in plain.evaluated:
        torch.testing.assert_close(velocity(x, torch.tensor(t)), (x - Gaussian(MEAN, VARIANCE).denoiser(Flow())(
            x, torch.tensor(t, dtype=torch.float64))) / t, rtol=1e-6, atol=1e-6)  # fmt: skip
    visited = torch.cat([x.flatten() for _, x in (*cached.evaluated, *plain.evaluated)] + [cached.x0.flatten()])
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    xs = torch.linspace(float(visited.min()) - 0.5, float(visited.max()) + 0.5, 101, dtype=torch.float64)
    field = velocity(xs[None], grid[:, None])
    lipschitz, speed = float(slope(grid).abs().max()), float(field.abs().max())
    rate = float((field.diff(dim=0) / (grid[1] - grid[0])).abs().max())
    h = 1 / steps
    off = (interval - 1) * h * (lipschitz * speed + rate)
    bound = off * ((1 + h * lipschitz) ** steps - 1) / lipschitz
    error = float((cached.x0 - plain.x0).abs().max())
    # Worst cases are summed up, so it is far off, but by the same factor whatever the step and the interval.
    assert error <= bound <= 50 * error


def test_the_error_of_reuse_is_of_first_order() -> None:
    errors = []
    for steps in (48, 96, 192):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        cached, plain = (generate(Flow(), Prediction.FLOW, times, n) for n in (3, 1))
        errors.append(float((cached.x0 - plain.x0).abs().max()))
    assert all(1.85 < a / b < 2.15 for a, b in pairwise(errors))
