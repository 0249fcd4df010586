"""Few-step solvers on oracles: the exact flow map in the place of a distilled network, and equality with diffusers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, TrigFlow, VPLinear
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Denoise
from suite.errors import ConfigError
from suite.plugins.solvers.consistency import Consistency, ConsistencySolver, renoise_weights
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEISSolver
from suite.plugins.solvers.lcm import LCM, LCMSolver, boundary_weights
from suite.plugins.solvers.lms import LMS
from suite.plugins.solvers.perflow import PeRFlow, PeRFlowSolver
from suite.plugins.solvers.tcd import TCD, TCDSolver, weights
from suite.testing import Gaussian, Mixture, drive
from suite.testing.oracles import a_run, moments

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import COMMON, KINDS, START, TRAINED, as_time, on_their_grid, predicts

NOISES = [VPLinear(), Cosine(), VE(10.0), Flow(), TrigFlow()]
families = pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
DATA = Gaussian(0.7, 0.25)


def distilled(noise: NoiseSchedule, target: Gaussian = DATA) -> Denoise:
    """A perfect consistency network: the end of the probability flow through (x, t)."""
    return lambda x, t: target.flow_map(noise, x, t, as_time(0.0)[0])


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SampleRng]:
    """Make a module of diffusers draw from our streams."""

    def from_ours(module: str) -> SampleRng:
        rng = SampleRng((0, 1, 2))
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor",
            lambda shape, dtype=None, **_: rng.normal(shape[1:]).to(dtype),
        )
        return rng

    return from_ours


# ---- laws --------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_perfect_network_gives_the_law_of_the_data_in_any_number_of_steps(noise: NoiseSchedule, steps: int) -> None:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    start = DATA.marginal(noise, times[0])
    for solver in (ConsistencySolver(noise, 0.0), TCDSolver(noise, 1.0)):
        got = moments(solver, times, distilled(noise), *start)
        torch.testing.assert_close(torch.stack(got), as_time(0.7, 0.25), rtol=1e-9, atol=1e-9)


def test_one_step_is_the_flow_and_needs_no_noise() -> None:
    noise, ends = Flow(), as_time(1.0, 0.0)
    exact = DATA.flow_map(noise, START, ends[0], ends[1])
    for solver in (ConsistencySolver(noise, 0.0), TCDSolver(noise, 0.3), LCMSolver(noise, 10.0)):
        torch.testing.assert_close(drive(solver, ends, distilled(noise), START), exact, rtol=0, atol=1e-6)


@families
def test_the_mean_of_x0_is_not_mended_by_steps(noise: NoiseSchedule) -> None:
    # Why `order` is 0: with a network that is not distilled the spread of the data is lost for good.
    variances = []
    for steps in (8, 64):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        start = DATA.marginal(noise, times[0])
        variances.append(float(moments(ConsistencySolver(noise, 0.0), times, DATA.denoiser(noise), *start)[1]))
    assert max(variances) < 0.2


def test_tcd_goes_from_ddim_to_consistency() -> None:
    noise, times = VPLinear(), torch.linspace(1, 0, 6, dtype=torch.float64)
    denoise = Mixture.two().denoiser(noise)
    torch.testing.assert_close(
        drive(TCDSolver(noise, 0.0), times, denoise, START), drive(DDIMSolver(noise, 0.0), times, denoise, START)
    )
    torch.testing.assert_close(
        drive(TCDSolver(noise, 1.0), times, denoise, START), drive(ConsistencySolver(noise, 0.0), times, denoise, START)
    )
    assert TCD(0.0).effects == frozenset() and TCD(0.3).effects == {"stochastic-step"}


@pytest.mark.parametrize("gamma", [0.2, 0.8])
def test_tcd_with_a_trajectory_network_keeps_the_law(gamma: float) -> None:
    # A trajectory network's x0 at (x, t) leads by DDIM's transfer to the exact flow at the time beyond.
    noise, times = VPLinear(), torch.linspace(1, 0, 5, dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        s = times[int((times - t).abs().argmin()) + 1]
        beyond = (1 - gamma) * s
        there, ratio = DATA.flow_map(noise, x, t, beyond), noise.sigma(beyond) / noise.sigma(t)
        return (there - ratio * x) / (noise.alpha(beyond) - noise.alpha(t) * ratio)

    got = moments(TCDSolver(noise, gamma), times, network, *DATA.marginal(noise, times[0]))
    torch.testing.assert_close(torch.stack(got), as_time(0.7, 0.25), rtol=1e-8, atol=1e-8)


def test_the_boundary_condition_of_lcm() -> None:
    assert boundary_weights(Flow(), as_time(0.0)[0], 10.0) == (1.0, 0.0)
    skip, out = boundary_weights(Flow(), as_time(0.5)[0], 10.0)
    assert skip == pytest.approx(0.25 / (5000**2 + 0.25)) and out == pytest.approx(5000 / (5000**2 + 0.25) ** 0.5)


# ---- windows -----------------------------------------------------------------------------------


def piecewise(noise: NoiseSchedule, windows: int) -> Denoise:
    """A perfect PeRFlow network: its line at (x, t) joins the ends of the exact flow over t's window."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        end = torch.floor(t * windows - 1e-9).clamp(min=0) / windows
        first = end + 1 / windows
        if float(noise.alpha(first)) == 0 and float(t) == float(first):
            at_end = DATA.flow_map(noise, x, first, end)
            ratio = noise.sigma(end) / noise.sigma(first)
            return (at_end - ratio * x) / (noise.alpha(end) - noise.alpha(first) * ratio)
        p = (first - t) / (first - end)
        (mean_f, var_f), (mean_e, var_e) = DATA.marginal(noise, first), DATA.marginal(noise, end)
        gain = (var_e / var_f).sqrt()  # x_end = mean_e + gain (x_first - mean_f), and x = (1 - p) x_first + p x_end
        x_first = (x - p * (mean_e - gain * mean_f)) / (1 - p + p * gain)
        x_end = mean_e + gain * (x_first - mean_f)
        ratio = noise.alpha(end) / noise.alpha(first)
        if float(noise.alpha(first)) == 0:  # the line from pure noise: its x0 is the same all along in flow noise
            return (x - noise.sigma(t) * x_first / noise.sigma(first)) / noise.alpha(t)
        epsilon = (x_end - ratio * x_first) / (noise.sigma(end) - noise.sigma(first) * ratio)
        return (x - noise.sigma(t) * epsilon) / noise.alpha(t)

    return network


@pytest.mark.parametrize("noise", [VPLinear(), VE(10.0), Flow()], ids=lambda n: n.family)
@pytest.mark.parametrize(("windows", "steps"), [(1, 1), (4, 4), (4, 8), (4, 12), (2, 6)])
def test_windows_of_a_straight_network_end_where_the_flow_does(noise: NoiseSchedule, windows: int, steps: int) -> None:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = START * float(noise.sigma(1.0))
    got = drive(PeRFlowSolver(noise, windows), times, piecewise(noise, windows), x)
    torch.testing.assert_close(got, DATA.flow_map(noise, x, times[0], times[-1]), rtol=0, atol=1e-9)


def test_in_flow_noise_windows_are_euler_steps() -> None:
    noise, times = Flow(), torch.linspace(1, 0, 9, dtype=torch.float64)
    denoise = Mixture.two().denoiser(noise)
    expected = drive(DDIMSolver(noise, 0.0), times, denoise, START)
    for windows in (1, 4, 8):
        torch.testing.assert_close(drive(PeRFlowSolver(noise, windows), times, denoise, START), expected)
    assert PeRFlowSolver(noise, 4).facts.order == 1 and PeRFlowSolver(VPLinear(), 4).facts.order == 0


def test_a_grid_that_does_not_stop_at_a_windows_end_is_refused() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"does not stop at 0\.25: use --schedule uniform with a multiple of 4 steps"):
        drive(PeRFlowSolver(Flow(), 4), times, never, START)
    with pytest.raises(ConfigError, match="needs at least 4 steps; got 2"):
        drive(PeRFlowSolver(Flow(), 4), times[::3], never, START)


# ---- against diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lcm_is_that_of_diffusers(kind: Prediction, draws: Any) -> None:
    from diffusers import LCMScheduler

    settings = {k: v for k, v in COMMON.items() if k != "timestep_spacing"}
    theirs: Any = LCMScheduler(**settings, **predicts(kind), original_inference_steps=50)
    theirs.set_timesteps(4)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    draws("scheduling_lcm")
    network, x = Mixture.two().output(noise, kind), START
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(network(x, t), k, x).prev_sample
    got = drive(LCMSolver(noise, 10.0), times, Mixture.two().denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_step_of_tcd_is_that_of_diffusers(kind: Prediction, gamma: float, draws: Any) -> None:
    # Theirs goes to timestep floor((1 - gamma) k), ours to the time (1 - gamma) s: at most one timestep apart.
    from diffusers import TCDScheduler

    settings = {k: v for k, v in COMMON.items() if k != "timestep_spacing"}
    theirs: Any = TCDScheduler(**settings, **predicts(kind))
    theirs.set_timesteps(4)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    rng = draws("scheduling_tcd")
    network, (t, s) = Mixture.two().output(noise, kind), times[:2]
    x = theirs.step(network(START, t), theirs.timesteps[0], START, eta=gamma).prev_sample
    beyond = torch.floor((1 - gamma) * theirs.timesteps[1]).double().add(1) / TRAINED
    assert abs(float(beyond - (1 - gamma) * s)) <= 1 / TRAINED
    a, b, c = weights(noise, t, s, beyond)
    z = SampleRng(rng.seeds).normal((1,)).double()
    torch.testing.assert_close(a * START + b * Mixture.two().denoiser(noise)(START, t) + c * z, x, rtol=0, atol=1e-5)


def test_consistency_is_that_of_diffusers(draws: Any) -> None:
    from diffusers import CMStochasticIterativeScheduler

    theirs: Any = CMStochasticIterativeScheduler(clip_denoised=False, s_noise=1.0)
    theirs.set_timesteps(4)
    noise, target = VE(80.0), Mixture.two()
    sigmas = theirs.sigmas[:4].double()
    times = torch.cat([noise.time_at(-2 * sigmas.log()), as_time(0.0)])
    draws("scheduling_consistency_models")
    x = start = 80.0 * START
    for k, sigma, t in zip(theirs.timesteps, sigmas, times, strict=False):
        theirs.scale_model_input(x, k)
        skip, out = theirs.get_scalings_for_boundary_condition(sigma)
        # A network of theirs is in front of the boundary scalings; ours answers behind them.
        x = theirs.step((target.denoiser(noise)(x, t) - skip * x) / out, k, x).prev_sample
    got = drive(ConsistencySolver(noise, 0.002), times, target.denoiser(noise), start)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_scm_is_consistency_in_trigflow(draws: Any) -> None:
    from diffusers import SCMScheduler

    theirs: Any = SCMScheduler(sigma_data=1.0)
    theirs.set_timesteps(2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    noise, target = TrigFlow(), Mixture.two()
    times = theirs.timesteps.double() / (torch.pi / 2)
    times = times.clamp(max=1.0)  # their 1.57080 is a little more than a quarter turn
    draws("scheduling_scm")
    x, denoise = START, target.denoiser(noise)
    for index, k in enumerate(theirs.timesteps[:-1]):
        x0 = denoise(x, times[index])
        f = (torch.cos(k.double()) * x - x0) / torch.sin(k.double())  # x0 = cos(t) x - sin(t) F
        x = theirs.step(f, k, x).prev_sample
    got = drive(ConsistencySolver(noise, 0.0), times, denoise, START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


def test_flow_lcm_is_consistency_in_flow_noise() -> None:
    from diffusers import FlowMatchLCMScheduler

    theirs: Any = FlowMatchLCMScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    noise, rng, x = Flow(), SampleRng((0, 1, 2)), START
    velocity, times = Mixture.two().output(noise, Prediction.FLOW), theirs.sigmas.double()
    generators = rng.generators
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(velocity(x, t).double(), k, x.double(), generator=generators).prev_sample
    got = drive(ConsistencySolver(noise, 0.0), times, Mixture.two().denoiser(noise), START)
    torch.testing.assert_close(got, x.double(), rtol=0, atol=1e-5)


# ---- names and options -------------------------------------------------------------------------


def test_lms_is_another_name() -> None:
    assert LMS(3).solver(noise=Flow(), run=a_run()) == DEISSolver(Flow(), 3, "rho")
    assert LMS(1).effects == frozenset() and LMS().effects == {"multistep"}


def test_the_floor_is_what_the_networks_answer_still_holds() -> None:
    of_x0, fresh = renoise_weights(VE(80.0), as_time(0.5)[0], 0.002)
    assert of_x0 == 1.0 and fresh == pytest.approx((0.625**2 - 0.002**2) ** 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consistency(floor=-1.0), "consistency: floor = -1.0: expected a number from 0"),
        (lambda: LCM(scaling=0.0), "lcm: scaling = 0.0: expected a number above 0"),
        (lambda: TCD(gamma=1.5), "tcd: gamma = 1.5: expected a number from 0 to 1"),
        (lambda: PeRFlow(windows=0), "perflow: windows = 0: expected a whole number from 1"),
        (lambda: LMS(order=5), "lms: order = 5: expected 1, 2, 3 or 4"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)
