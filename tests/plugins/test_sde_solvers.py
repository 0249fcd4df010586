"""Solvers that draw noise: exact mean and variance, and equality with diffusers."""

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Flow, Laplace, NoiseSchedule, VPLinear, VPTable
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.errors import ConfigError
from suite.plugins.solvers._langevin import langevin
from suite.plugins.solvers._stochastic import forward_weights, noised, posterior_weights, rates
from suite.plugins.solvers.ancestral import Ancestral, AncestralSolver
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEISSolver
from suite.plugins.solvers.edm import EDM, EDMSolver
from suite.plugins.solvers.euler_maruyama import EulerMaruyamaSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.plugins.solvers.langevin import Langevin, LangevinSolver
from suite.plugins.solvers.pc import PC, PCSolver
from suite.plugins.solvers.restart import Restart, RestartSolver
from suite.plugins.solvers.sa import SA, SASolver
from suite.plugins.solvers.sde_dpmpp import SDEDPMpp, SDEDPMppSolver
from suite.rules import BOOK
from suite.testing import Gaussian, Mixture, PointMass, drive
from suite.testing.oracles import a_run, affine_run, affine_step, log_snr_times, moments

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import COMMON, KINDS, OLD_NUMPY, START, TRAINED, as_time, on_their_grid, predicts

ALL = (0.0, 1.0)


# ---- exact moments -----------------------------------------------------------------------------


def test_moments_of_a_run_are_those_of_its_steps() -> None:
    noise, target, solver = VPLinear(), Gaussian(), EulerMaruyamaSolver(VPLinear(), "time")
    times, denoise = log_snr_times(noise, 12), target.denoiser(noise)
    mean, variance = target.marginal(noise, times[0])
    got = moments(solver, times, denoise, mean, variance)
    for t, s in itertools.pairwise(times):
        a, b, fresh = affine_step(solver, denoise, t, s)
        mean, variance = a * mean + b, a**2 * variance + fresh
    torch.testing.assert_close(torch.stack(got), torch.stack([mean, variance]), rtol=1e-12, atol=1e-12)


def test_moments_of_a_multistep_run_are_those_of_samples() -> None:
    noise, target, solver, count = VPLinear(), Gaussian(), SDEDPMppSolver(VPLinear(), 2), 4000
    times, denoise = log_snr_times(noise, 5), target.denoiser(noise)
    mean, variance = target.marginal(noise, times[0])
    rng = SampleRng(range(count))
    start = mean + variance.sqrt() * rng.normal((1,)).double()
    x = drive(solver, times, denoise, start, rng=rng)
    mean, variance = moments(solver, times, denoise, mean, variance)
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * math.sqrt(float(variance) / count))
    assert float(x.var()) == pytest.approx(float(variance), rel=4 * math.sqrt(2 / count))


def test_a_run_that_is_not_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="PCSolver is not affine"):
        affine_run(PCSolver(Flow(), "ancestral", 1, 0.1, "measured"), as_time(0.9, 0.1), Gaussian().denoiser(Flow()))


# ---- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [VPLinear(), VE(), Flow()], ids=lambda n: n.family)
def test_the_forward_kernel_composes_and_its_posterior_is_bayes(noise: NoiseSchedule) -> None:
    s, u, t = as_time(0.2, 0.5, 0.8)
    (a, b), (c, d), (e, f) = (map(float, forward_weights(noise, *pair)) for pair in ((s, u), (u, t), (s, t)))
    assert a * c == pytest.approx(e, rel=1e-12) and math.hypot(c * b, d) == pytest.approx(f, rel=1e-12)
    prior, likelihood = float(noise.sigma(s)) ** 2, f**2
    of_x, of_x0, deviation = map(float, posterior_weights(noise, t, s))
    precision = 1 / prior + e**2 / likelihood
    assert deviation**2 == pytest.approx(1 / precision, rel=1e-9)
    assert of_x == pytest.approx(e / likelihood / precision, rel=1e-9)
    assert of_x0 == pytest.approx(float(noise.alpha(s)) / prior / precision, rel=1e-9)


def test_rates_are_those_of_the_papers() -> None:
    t = as_time(0.1, 0.5, 0.9)
    f, g2 = rates(VPLinear(), t)
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(torch.stack([f, g2]), torch.stack([-beta / 2, beta]), rtol=1e-10, atol=0)
    f, g2 = rates(VE(), t)
    torch.testing.assert_close(torch.stack([f, g2]), torch.stack([0 * t, 14 * VE().sigma(t) ** 2 / t]))
    f, g2 = rates(Flow(), t)
    torch.testing.assert_close(torch.stack([f, g2]), torch.stack([-1 / (1 - t), 2 * t / (1 - t)]))
    # The middle of Laplace's schedule, where its pieces meet.
    f, g2 = rates(Laplace(), as_time(0.5))
    assert float(g2 / 2 / Laplace().sigma(as_time(0.5)) ** 2) == pytest.approx(0.5)
    with torch.inference_mode():
        assert float(rates(Flow(), as_time(0.5)[0])[1]) == pytest.approx(2.0)


def test_first_orders_are_one_ancestral_step() -> None:
    noise, denoise, times = Flow(), Mixture.two().denoiser(Flow()), torch.linspace(1, 0, 9, dtype=torch.float64)
    expected = drive(AncestralSolver(noise, "fixed-small"), times, denoise, START)
    for solver in (DDIMSolver(noise, 1.0), SDEDPMppSolver(noise, 1), SASolver(noise, 1, 0, 1.0, ALL, False)):
        torch.testing.assert_close(drive(solver, times, denoise, START), expected, rtol=0, atol=1e-12)


def test_fixed_large_has_the_variance_of_the_forward_step() -> None:
    noise, denoise = VPTable.named("linear"), PointMass(0.7).denoiser(VPTable.named("linear"))
    s, t = as_time(0.5, 0.501)
    beta = 1 - (noise.alpha(t) / noise.alpha(s)) ** 2
    small, large = (affine_step(AncestralSolver(noise, v), denoise, t, s) for v in ("fixed-small", "fixed-large"))
    assert float(large[2]) == pytest.approx(float(beta), rel=1e-9)
    torch.testing.assert_close(torch.stack(small[:2]), torch.stack(large[:2]))
    # On standard normal data the forward step's variance is the right one.
    normal, (mean, variance) = Gaussian(0.0, 1.0), (as_time(0.0)[0], as_time(1.0)[0])
    got = moments(AncestralSolver(noise, "fixed-large"), torch.stack([t, s]), normal.denoiser(noise), mean, variance)
    assert float(got[1]) == pytest.approx(1.0, abs=2 * float(beta) ** 2)


def test_in_ve_the_two_forms_of_the_reverse_sde_have_one_limit_but_differ() -> None:
    noise, target = VE(10.0), Gaussian()
    ends = {}
    for form in ("reverse-diffusion", "time"):
        times = log_snr_times(noise, 400)
        ends[form] = torch.stack(
            moments(EulerMaruyamaSolver(noise, form), times, target.denoiser(noise), *target.marginal(noise, times[0]))
        )
    exact = torch.stack(target.marginal(noise, times[-1]))
    for got in ends.values():
        torch.testing.assert_close(got, exact, rtol=0.02, atol=0)
    assert not torch.allclose(*ends.values(), rtol=1e-6)


def test_a_wrong_prior_is_forgotten_by_the_sde_and_kept_by_the_ode() -> None:
    # "Blessing of randomness" (Nie 2023): KL to the target shrinks under the SDE, and the flow leaves it as it is.
    noise, target = VPLinear(), Gaussian(0.0, 0.25)
    times = log_snr_times(noise, 320, -2.0, 2.0)
    denoise, (mean, variance) = target.denoiser(noise), target.marginal(noise, times[0])

    def divergence(got: tuple[Tensor, Tensor], time: Tensor) -> float:
        m, v = target.marginal(noise, time)
        return float((got[1] / v + (got[0] - m) ** 2 / v - 1 - (got[1] / v).log()) / 2)

    wrong = (mean + 0.3, 1.5 * variance)
    before = divergence(wrong, times[0])
    sde = divergence(moments(DDIMSolver(noise, 1.0), times, denoise, *wrong), times[-1])
    ode = divergence(moments(HeunSolver(noise), times, denoise, *wrong), times[-1])
    assert sde < 0.1 * before and ode == pytest.approx(before, rel=1e-3)


# ---- Langevin ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.05, 0.5])
def test_langevin_reaches_its_biased_stationary_law(size: float) -> None:
    noise, target, t = Flow(), Gaussian(), as_time(0.4)[0]
    mean, variance = target.marginal(noise, t)
    step = size * float(noise.sigma(t)) ** 2
    # x' = x - e (x - m) / v + sqrt(2 e) z keeps m, and its variance is v / (1 - e / 2v).
    biased = float(variance) / (1 - step / (2 * float(variance)))
    a = 1 - step / float(variance)
    zero, one = (
        float(langevin(noise, target.denoiser(noise), mean + as_time(v)[:, None], t, size, _Silent()) - mean)
        for v in (0.0, 1.0)
    )
    assert (zero, one) == pytest.approx((0, a), abs=1e-12)
    assert a**2 * biased + 2 * step == pytest.approx(biased, rel=1e-12)
    # Many repeats at one level forget where they began.
    solver = LangevinSolver(noise, 1000, size)
    got = moments(solver, torch.stack([as_time(0.41)[0], t]), target.denoiser(noise), mean + 1, 3 * variance)
    assert float(got[0]) == pytest.approx(float(mean), abs=1e-6) and float(got[1]) == pytest.approx(biased, rel=1e-6)


class _Silent(SampleRng):
    """No noise at all."""

    def __init__(self) -> None:
        super().__init__((0,))

    def normal(self, shape: Any, like: Tensor | None = None) -> Tensor:
        return torch.zeros(1, *shape) if like is None else like.new_zeros(1, *shape)


def test_ncsns_step_is_a_part_of_the_variance() -> None:
    # alpha_i = 2e-5 (sigma_i / 0.01)^2, x + alpha/2 score + sqrt(alpha) z: e = alpha / 2 is 0.1 sigma_i^2.
    noise, target, t = VE(10.0), Gaussian(), as_time(0.6)[0]
    sigma = float(noise.sigma(t))
    alpha = 2e-5 * (sigma / 0.01) ** 2
    x = START[:1]
    theirs = x + alpha / 2 * target.score(noise)(x, t)
    torch.testing.assert_close(langevin(noise, target.denoiser(noise), x, t, 0.1, _Silent()), theirs)


def test_the_corrector_keeps_the_mean_and_removes_the_predictors_error() -> None:
    noise, target = VE(10.0), Gaussian()
    times = log_snr_times(noise, 20)
    exact, start = target.marginal(noise, times[-1]), target.marginal(noise, times[0])
    errors = []
    for corrections in (0, 1, 4):
        solver = PCSolver(noise, "reverse-diffusion", corrections, 0.2, "expected")
        got = moments(solver, times, target.denoiser(noise), *start)
        errors.append(sum(float((g - e).abs()) for g, e in zip(got, exact, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    t = as_time(0.5)[0]
    mean, _ = target.marginal(noise, t)
    torch.testing.assert_close(
        langevin(noise, target.denoiser(noise), mean.reshape(1, 1), t, 0.3, _Silent())[0, 0], mean
    )


def test_norms_of_many_pixels_are_what_is_expected_of_them() -> None:
    noise, target, t = VPLinear(), Gaussian(0.0, 0.0), as_time(0.8, 0.7)
    x = float(noise.sigma(t[0])) * SampleRng((0, 1)).normal((3, 64, 64)).double()
    expected, measured = (
        PCSolver(noise, "ancestral", 1, 0.1, norms).step(
            target.denoiser(noise), x, t[0], t[1], None, SampleRng((2, 3))
        )[0]
        for norms in ("expected", "measured")
    )
    assert float((expected - measured).norm() / expected.norm()) < 0.01


# ---- churn and restart -------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_without_churn_edm_is_the_ode_solver(order: int) -> None:
    noise, times = Flow(), torch.linspace(1, 0, 8, dtype=torch.float64)
    denoise = Mixture.two().denoiser(noise)
    plain = HeunSolver(noise) if order == 2 else DDIMSolver(noise, 0.0)
    got = drive(EDM(order).solver(noise=noise, run=a_run()), times, denoise, START)
    assert torch.equal(got, drive(plain, times, denoise, START))


def test_churn_leaves_the_law_of_the_oracle_alone() -> None:
    # Noise up is exact in law: on a point, where the flow is exact too, any churn keeps mean and variance.
    noise, point = VPLinear(), PointMass(0.7)
    times = torch.linspace(0.9, 0.1, 9, dtype=torch.float64)
    start, end = (torch.stack(point.marginal(noise, t)) for t in times[[0, -1]])
    for churn, low, high in ((1.0, 0.0, 1.0), (100.0, 0.0, 1.0), (100.0, 0.3, 0.6)):
        solver = EDMSolver(noise, HeunSolver(noise), churn, (low, high), 1.0)
        torch.testing.assert_close(torch.stack(moments(solver, times, point.denoiser(noise), *start)), end)
    more = EDMSolver(noise, HeunSolver(noise), 100.0, ALL, 1.05)
    assert float(moments(more, times, point.denoiser(noise), *start)[1]) > float(end[1]) * 1.001


def test_edms_stochastic_sampler_is_its_listing() -> None:
    # Algorithm 2 written out in EDM's own coordinates, with the same draws.
    noise, target, churn, steps = VE(80.0), Mixture.two(), 5.0, 12
    sigmas = torch.cat([torch.linspace(80 ** (1 / 7), 0.01 ** (1 / 7), steps, dtype=torch.float64) ** 7, as_time(0.0)])
    times = torch.cat([noise.time_at(-2 * sigmas[:-1].log()), as_time(0.0)])
    denoise, rng, x = target.denoiser(noise), SampleRng((0, 1, 2)), 80 * START
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        z = rng.normal_like(x)
        # Ours cannot go beyond t = 1.
        up = (sigma * (1 + min(churn / steps, math.sqrt(2) - 1))).clamp(max=80.0)
        there = x + (up**2 - sigma**2).clamp(min=0).sqrt() * z
        slope = (there - denoise(there, noise.time_at(-2 * up.log()))) / up
        x = there + (following - up) * slope
        if index < steps - 1:
            second = (x - denoise(x, noise.time_at(-2 * following.log()))) / following
            x = there + (following - up) * (slope + second) / 2
    solver = EDMSolver(noise, HeunSolver(noise), churn, ALL, 1.0)
    got = drive(solver, times, denoise, 80 * START, seeds=(0, 1, 2))
    torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


def test_no_jump_is_heun_and_a_jump_keeps_the_law() -> None:
    noise, times = Flow(), torch.linspace(1, 0, 8, dtype=torch.float64)
    denoise = Mixture.two().denoiser(noise)
    plain = drive(HeunSolver(noise), times, denoise, START)
    assert torch.equal(drive(RestartSolver(noise, 0, 0.25, 0.15, 0.45), times, denoise, START), plain)
    point = PointMass(0.7)
    start, end = (torch.stack(point.marginal(noise, t)) for t in times[[1, -2]])
    got = moments(RestartSolver(noise, 3, 0.25, 0.2, 0.6), times[1:-1], point.denoiser(noise), *start)
    torch.testing.assert_close(torch.stack(got), end)


def test_restart_shrinks_an_error_that_the_flow_carries_on() -> None:
    noise, target = VPLinear(), Gaussian(0.0, 0.25)
    times = log_snr_times(noise, 60, -4.0, 4.0)
    mean, variance = target.marginal(noise, times[0])
    errors = []
    for jumps in (0, 1, 4):
        solver = RestartSolver(noise, jumps, 0.5, 0.15, 0.6)
        got = moments(solver, times, target.denoiser(noise), mean + 0.5, variance)
        errors.append(abs(float(got[0])))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


def test_restart_wants_one_time_a_sample() -> None:
    noise, times = Flow(), as_time(0.5, 0.16).reshape(1, 2)
    with pytest.raises(ConfigError, match="only some of its parts pass"):
        RestartSolver(noise, 1, 0.25, 0.15, 0.45).step(
            Mixture.two((2,)).denoiser(noise), torch.zeros(1, 2), times, times - 0.05, 1, SampleRng((0,))
        )


def test_jumps_are_told_to_the_rules() -> None:
    (rule,) = [r for r in BOOK if r.id == "C29"]
    for plugin in (Restart(), EDM(churn=10.0)):
        assert any(part <= plugin.effects for part in rule.parts)
    assert not any(part <= EDM().effects for part in rule.parts)


# ---- against diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_ancestral_is_that_of_diffusers(kind: Prediction, variance: Any) -> None:
    from diffusers import DDPMScheduler

    theirs: Any = DDPMScheduler(**COMMON, **predicts(kind), clip_sample=False, variance_type=variance.replace("-", "_"))
    theirs.set_timesteps(20)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, x, rng = Mixture.two(), START, SampleRng((0, 1, 2))
    network = target.output(noise, kind)
    with _noise(rng, "diffusers.schedulers.scheduling_ddpm"):
        # At the end theirs adds noise to clean data where the variance is fixed_large; ours does not.
        for k, t in list(zip(theirs.timesteps, times, strict=False))[:-1]:
            x = theirs.step(network(x, t), k, x).prev_sample
    got = drive(AncestralSolver(noise, variance), times[:-1], target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpmpp_is_that_of_diffusers(kind: Prediction, order: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs: Any = DPMSolverMultistepScheduler(
        **COMMON, **predicts(kind), algorithm_type="sde-dpmsolver++", solver_order=order, final_sigmas_type="zero"
    )
    theirs.set_timesteps(12)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, x, rng = Mixture.two(), START, SampleRng((0, 1, 2))
    network = target.output(noise, kind)
    for k, t in zip(theirs.timesteps, times, strict=False):
        x = theirs.step(network(x, t), k, x, variance_noise=rng.normal_like(x)).prev_sample
    got = drive(SDEDPMppSolver(noise, order), times, target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("order", "corrector", "tau"), [(1, 1, 1.0), (2, 2, 1.0), (3, 3, 1.0), (3, 4, 0.5), (3, 3, 0.0)]
)
def test_sa_is_that_of_diffusers(kind: Prediction, order: int, corrector: int, tau: float) -> None:
    got, theirs = _sa(kind, order, corrector, tau, 12)
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5)


@OLD_NUMPY
def test_unadjusted_sa_of_order_2_differs_from_diffusers_by_a_term_of_second_order() -> None:
    gaps = []
    for steps in (25, 50, 100):
        got, theirs = _sa(Prediction.EPSILON, 2, 0, 0.0, steps, False)
        gaps.append(float((got - theirs).abs().max()))
    # At each step (h^2 / 2 - (h - 1 + e^-h)) / h_before of a difference of x0, so a gap of the second order.
    assert gaps[0] > 1e-4 and all(2.5 < a / b < 8 for a, b in itertools.pairwise(gaps))


def _sa(
    kind: Prediction, order: int, corrector: int, tau: float, steps: int, adjusted: bool = True
) -> tuple[Tensor, Tensor]:
    """Ours and theirs after all steps but the last `order`, which theirs takes with a lower order."""
    from diffusers import SASolverScheduler

    theirs: Any = SASolverScheduler(
        **COMMON, **predicts(kind), predictor_order=order, corrector_order=max(corrector, 1),
        tau_func=lambda k: torch.tensor(tau if 200 <= k <= 800 else 0.0, dtype=torch.float64),
    )  # fmt: skip
    theirs.set_timesteps(steps)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, x, rng, leave = Mixture.two(), START, SampleRng((0, 1, 2)), max(order, corrector)
    network = target.output(noise, kind)
    with _noise(rng, "diffusers.schedulers.scheduling_sasolver"):
        for k, t in list(zip(theirs.timesteps, times, strict=False))[: steps - leave]:
            if not corrector:
                theirs.last_sample = None
            x = theirs.step(network(x, t), k, x).prev_sample
    # Their timestep k is our (k + 1) / T.
    interval = (200.5 / TRAINED, 801.5 / TRAINED)
    solver = SASolver(noise, order, corrector, tau, interval, adjusted)
    seeded = SampleRng((0, 1, 2))
    return drive(solver, times[: steps - leave + 1], target.denoiser(noise), START, rng=seeded), x


class _noise:
    """Inside it a module of diffusers draws from our streams."""

    def __init__(self, rng: SampleRng, module: str) -> None:
        self.patch, self.rng, self.module = pytest.MonkeyPatch(), rng, module

    def __enter__(self) -> None:
        def drawn(shape: Any, dtype: Any = None, **_: Any) -> Tensor:
            return self.rng.normal(shape[1:]).to(dtype)

        self.patch.setattr(f"{self.module}.randn_tensor", drawn)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_reverse_diffusion_and_corrector_are_those_of_diffusers_in_ve() -> None:
    from diffusers import ScoreSdeVeScheduler

    theirs: Any = ScoreSdeVeScheduler(num_train_timesteps=20, snr=0.1, sigma_min=0.01, sigma_max=10.0)
    theirs.set_timesteps(20)
    theirs.set_sigmas(20)
    noise, target = VE(10.0), Mixture.two((32,))
    score, rng = target.score(noise), SampleRng((5,))
    times = noise.time_at(-2 * theirs.discrete_sigmas.flip(0).double().log())
    x = start = 10 * SampleRng((9,)).normal((32,)).double()
    with _noise(rng, "diffusers.schedulers.scheduling_sde_ve"):
        for index in range(19):
            x = theirs.step_pred(score(x, times[index]), theirs.timesteps[index], x).prev_sample
            x = theirs.step_correct(score(x, times[index + 1]), x).prev_sample
    solver = PCSolver(noise, "reverse-diffusion", 1, 0.1, "measured")
    got = drive(solver, times, target.denoiser(noise), start, seeds=(5,))
    torch.testing.assert_close(got, x.double(), rtol=1e-4, atol=1e-4)


def test_euler_maruyama_in_time_is_that_of_diffusers_in_vp() -> None:
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    theirs: Any = ScoreSdeVpScheduler()
    theirs.set_timesteps(25)
    noise, target, rng = VPLinear(), Mixture.two(), SampleRng((0, 1, 2))
    epsilon = target.output(noise, Prediction.EPSILON)
    times = 1 - torch.arange(25, dtype=torch.float64) / 25
    x = START
    with _noise(rng, "diffusers.schedulers.deprecated.scheduling_sde_vp"):
        for t in times[:-1]:
            # Theirs is told epsilon, which it calls a score; its grid is meant for steps of 1 / n.
            x, _ = theirs.step_pred(epsilon(x, t), x, t)
    got = drive(EulerMaruyamaSolver(noise, "time"), times, target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


def test_without_noise_sa_is_unmodified_adams() -> None:
    # tau = 0 on x0 against DEIS on epsilon: two polynomials, so only of first order are they one method.
    noise, denoise = Flow(), Mixture.two().denoiser(Flow())
    times = torch.linspace(0.95, 0.05, 20, dtype=torch.float64)
    one, two = (
        drive(s, times, denoise, START) for s in (SASolver(noise, 1, 0, 0.0, ALL, False), DEISSolver(noise, 1, "t"))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SDEDPMpp(3), "sde-dpmpp: order = 3: expected 1 or 2"),
        (lambda: SA(order=5), "sa: order = 5: expected 1, 2, 3 or 4"),
        (lambda: SA(corrector=5), "sa: corrector = 5: expected 0 (none), 1, 2, 3 or 4"),
        (lambda: SA(tau=-1), "sa: tau = -1: expected a number from 0"),
        (lambda: SA(low=0.9), "expected 0 <= low <= high <= 1"),
        (lambda: EDM(order=3), "edm: order = 3: expected 1 (Euler) or 2 (Heun)"),
        (lambda: EDM(churn=-1), "edm: churn = -1: expected a number of 0 or more"),
        (lambda: EDM(inflation=9), "edm: inflation = 9"),
        (lambda: Langevin(repeats=1), "langevin: repeats = 1"),
        (lambda: Langevin(size=2.0), "langevin: size = 2.0"),
        (lambda: PC(corrections=-1), "pc: corrections = -1"),
        (lambda: PC(snr=0.0), "pc: snr = 0.0"),
        (lambda: Restart(jumps=-1), "restart: jumps = -1"),
        (lambda: Restart(low=0.5, high=0.4), "expected 0 < low < high < 1"),
        (lambda: Restart(share=0.0), "restart: share = 0.0"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)


def test_words_follow_the_options() -> None:
    assert SA(tau=0.0).effects == {"multistep"} and SA(order=1, corrector=0).effects == {"stochastic-step"}
    assert Restart(jumps=0).effects == {"repeated-evaluations"} and Ancestral().effects == {"stochastic-step"}
    assert noised(Flow(), START, as_time(0.2)[0], as_time(0.2)[0], SampleRng((0, 1, 2))).equal(START)
