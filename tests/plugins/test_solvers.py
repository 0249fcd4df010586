"""First-party solvers: variance, and equality with diffusers, on targets that are known exactly."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, Sqrt, TrigFlow, VPLinear, VPTable
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Solver
from suite.errors import ConfigError
from suite.host.discovery import installed
from suite.host.manager import Manager, load
from suite.plugins.solvers.ddim import DDIM, DDIMSolver
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.recipe import from_options
from suite.testing import Gaussian, Mixture, PointMass, drive
from suite.testing.oracles import a_run, affine_step, moments, slope

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import COMMON, KINDS, OLD_NUMPY, START, STEPS, TRAINED, as_time, on_their_grid, predicts

NOISES = [VPLinear(), Flow(), Cosine(), VE(), TrigFlow()]
X = START


def ddim(noise: NoiseSchedule) -> Solver:
    return DDIMSolver(noise, 0.0)


# ---- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [VPLinear(), Flow(), TrigFlow()], ids=lambda n: n.family)
def test_ddim_is_euler_in_ve_coordinates(noise: NoiseSchedule) -> None:
    times = torch.linspace(0.95, 0.05, 31, dtype=torch.float64)
    denoise = Mixture.two().denoiser(noise)
    y = X / noise.alpha(times[0])
    for t, s in itertools.pairwise(times):
        r_t, r_s = (noise.sigma(u) / noise.alpha(u) for u in (t, s))
        y = y + (r_s - r_t) * (y - denoise(noise.alpha(t) * y, t)) / r_t
    got = drive(ddim(noise), times, denoise, X)
    torch.testing.assert_close(got, noise.alpha(times[-1]) * y, rtol=1e-12, atol=1e-12)


def test_flow_euler_is_ddim() -> None:
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    velocity = Mixture.two().output(Flow(), Prediction.FLOW)
    x = X
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * velocity(x, t)
    torch.testing.assert_close(drive(ddim(Flow()), times, Mixture.two().denoiser(Flow()), X), x, rtol=0, atol=1e-12)


def test_ddim_is_not_the_surveys_equation_8() -> None:
    # Eq. 8 omits the division by sqrt(alpha_bar_t); a point shows which is right.
    noise, point = VPLinear(), PointMass(0.7)
    t, s = as_time(0.8, 0.4)
    x = point.flow_map(noise, X, 1.0, t)
    right, _ = ddim(noise).step(point.denoiser(noise), x, t, s, None, SampleRng((0, 1, 2)))
    exact = point.flow_map(noise, x, t, s)
    eps = (x - noise.alpha(t) * 0.7) / noise.sigma(t)
    printed = noise.alpha(s) * (x - noise.sigma(t) * eps) + noise.sigma(s) * eps
    torch.testing.assert_close(right, exact, rtol=0, atol=1e-14)
    assert (printed - exact).abs().min() > 0.1


def test_ddim_at_eta_1_is_ddpm() -> None:
    noise = VPTable.named("linear")
    denoise = PointMass(0.7).denoiser(noise)
    for k in (1, 10, 500, 998):
        s, t = as_time(k / 1000, (k + 1) / 1000)
        bar_t, bar_s = noise.alpha(t) ** 2, noise.alpha(s) ** 2
        beta = 1 - bar_t / bar_s
        a, b, variance = affine_step(DDIMSolver(noise, 1.0), denoise, t, s)
        assert float(variance) == pytest.approx(float((1 - bar_s) / (1 - bar_t) * beta), abs=1e-12)
        assert float(beta) == pytest.approx(noise.betas[k], abs=1e-12)
        assert float(a) == pytest.approx(float((1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t)), abs=1e-12)
        assert float(b) == pytest.approx(float(bar_s.sqrt() * beta / (1 - bar_t)) * 0.7, abs=1e-12)


@pytest.mark.parametrize("noise", [VPLinear(), VE(sigma_max=10.0), Flow()], ids=lambda n: n.family)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_in_between(eta: float, noise: NoiseSchedule) -> None:
    # Exact mean and variance of every step's samples, by recursion. With all data at one point no eta
    # changes them; and the fresh part of the variance is eta^2 of the posterior's.
    point, times = PointMass(0.7), torch.linspace(0.9, 0.1, 11, dtype=torch.float64)
    denoise = point.denoiser(noise)
    mean, variance = point.marginal(noise, times[0])
    for t, s in itertools.pairwise(times):
        a, b, fresh = affine_step(DDIMSolver(noise, eta), denoise, t, s)
        mean, variance = a * mean + b, a**2 * variance + fresh
        torch.testing.assert_close(torch.stack([mean, variance]), torch.stack(point.marginal(noise, s)))
        full = affine_step(DDIMSolver(noise, 1.0), denoise, t, s)[2]
        assert float(fresh) == pytest.approx(eta**2 * float(full), abs=1e-12)


def test_moments_are_those_of_samples() -> None:
    noise, target, solver = Flow(), Gaussian(), DDIMSolver(Flow(), 1.0)
    times, count = torch.linspace(1, 0, 9, dtype=torch.float64), 4000
    rng = SampleRng(range(count))
    x = drive(solver, times, target.denoiser(noise), rng.normal((1,)).double(), rng=rng)
    mean, variance = moments(solver, times, target.denoiser(noise), as_time(0.0)[0], as_time(1.0)[0])
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * math.sqrt(float(variance) / count))
    assert float(x.var()) == pytest.approx(float(variance), rel=4 * math.sqrt(2 / count))


# ---- against diffusers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_is_that_of_diffusers(kind: Prediction, eta: float) -> None:
    from diffusers import DDIMScheduler

    theirs: Any = DDIMScheduler(**COMMON, **predicts(kind), clip_sample=False)
    theirs.set_timesteps(STEPS)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, rng, x = Mixture.two(), SampleRng((0, 1, 2)), START
    network = target.output(noise, kind)
    for k, t in zip(theirs.timesteps, times, strict=False):
        drawn = rng.normal_like(x) if eta else None
        x = theirs.step(network(x, t), int(k), x, eta=eta, variance_noise=drawn).prev_sample
    got = drive(DDIMSolver(noise, eta), times, target.denoiser(noise), START, seeds=(0, 1, 2))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, STEPS])
def test_dpmpp_2m_is_that_of_diffusers(kind: Prediction, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs: Any = DPMSolverMultistepScheduler(
        **COMMON, **predicts(kind), algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, x = Mixture.two(), START
    network = target.output(noise, kind)
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(network(x, t), k, x).prev_sample
    got = drive(DPMpp2MSolver(noise), times, target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
def test_heun_is_that_of_diffusers(kind: Prediction) -> None:
    from diffusers import HeunDiscreteScheduler

    theirs: Any = HeunDiscreteScheduler(**COMMON, **predicts(kind))
    theirs.set_timesteps(STEPS)
    stops = torch.cat([theirs.timesteps[:1], theirs.timesteps[1::2]])
    noise, times = on_their_grid(theirs.betas, stops)
    target = Mixture.two()
    network = target.output(noise, kind)
    # Theirs steps y = x / alpha and repeats each stop but the first, once for each slope.
    y, calls = START / noise.alpha(times[0]), 0
    for k in theirs.timesteps:
        t = (k.double() + 1) / TRAINED
        y = theirs.step(network(theirs.scale_model_input(y, k).double(), t), k, y).prev_sample
        calls += 1
    solver = HeunSolver(noise)
    got = drive(solver, times, target.denoiser(noise), START)
    torch.testing.assert_close(got, y, rtol=0, atol=1e-5)
    assert calls == solver.evaluations(STEPS) == 2 * STEPS - 1


def test_flow_euler_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(STEPS)
    # Theirs ends its grid at its smallest trained sigma and then jumps to 0, so take the grid from it.
    times, target, x = theirs.sigmas.double(), Mixture.two(), START
    velocity = target.output(Flow(), Prediction.FLOW)
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(velocity(x, t), k, x).prev_sample
    got = drive(ddim(Flow()), times, target.denoiser(Flow()), START)
    torch.testing.assert_close(got, x.double(), rtol=0, atol=1e-5)


def test_heun_of_flow_matching_is_another_rule_of_the_same_order() -> None:
    # FlowMatchHeunDiscreteScheduler averages velocities over t; ours averages epsilon over sigma / alpha, in
    # every family alike. The two trapezoids differ, by an amount that falls with the square of the step.
    target, velocity = Mixture.two(), Mixture.two().output(Flow(), Prediction.FLOW)
    steps, gaps = (40, 80, 160, 320), []
    for count in steps:
        times, x = torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64), START
        for t, s in itertools.pairwise(times):
            first = velocity(x, t)
            x = x + (s - t) * (first + velocity(x + (s - t) * first, s)) / 2
        got = drive(HeunSolver(Flow()), times, target.denoiser(Flow()), START)
        gaps.append(float((got - x).abs().max()))
    assert gaps[0] > 1e-6
    assert slope(steps, gaps) == pytest.approx(2, abs=0.15)


# ---- evaluations and options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "expected"), [(VPLinear(), 35), (VE(), 35), (Flow(), 34), (Cosine(), 34), (Sqrt(), 35)],
    ids=lambda v: getattr(v, "family", str(v)),
)  # fmt: skip
def test_heun_counts_its_evaluations(noise: NoiseSchedule, expected: int) -> None:
    # 2n - 1, EDM's 35 for 18 steps; one fewer where alpha(1) = 0, whose first step is Euler's.
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return Gaussian().denoiser(noise)(x, t)

    solver = HeunSolver(noise)
    drive(solver, torch.linspace(1, 0, 19, dtype=torch.float64), denoise, X)
    # The square-root schedule has noise left at t = 0 and alpha = 0 at t = 1.
    assert len(calls) == solver.evaluations(18) == expected


def test_history_is_used_only_where_it_is_finite() -> None:
    noise = Flow()
    times = as_time(1.0, 0.6, 0.3, 0.0)
    denoise, rng = Mixture.two().denoiser(noise), SampleRng((0, 1, 2))
    two_m, one = DPMpp2MSolver(noise), ddim(noise)
    x, state = two_m.step(denoise, X, times[0], times[1], two_m.init(a_run()), rng)
    assert torch.equal(x, one.step(denoise, X, times[0], times[1], None, rng)[0])
    # log-SNR is -inf at t = 1: the step after it extrapolates nothing; nor does the step to 0.
    second, later = two_m.step(denoise, x, times[1], times[2], state, rng)
    assert torch.equal(second, one.step(denoise, x, times[1], times[2], None, rng)[0])
    last, _ = two_m.step(denoise, second, times[2], times[3], later, rng)
    torch.testing.assert_close(last, denoise(second, times[2]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_is_checked(eta: float) -> None:
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        DDIM(eta)


def test_effects_follow_eta() -> None:
    assert DDIM(0.0).effects == frozenset() and DDIM(0.1).effects == {"stochastic-step"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ddim", DDIMSolver(Flow(), 0.0)),
        ("ddim:eta=0.5", DDIMSolver(Flow(), 0.5)),
        ("dpmpp-2m", DPMpp2MSolver(Flow())),
        ("heun", HeunSolver(Flow())),
    ],
)
def test_hook_solver(text: str, expected: Solver) -> None:
    manager = Manager(load(from_options(solver=text), installed(), "image"))
    assert manager.solver(Flow(), a_run()) == expected
