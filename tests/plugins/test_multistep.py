"""Exponential and linear multistep solvers, and DPM-Solver: exactness, and equality with diffusers."""

import itertools
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import Flow, NoiseSchedule, VPLinear
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Solver
from suite.errors import ConfigError
from suite.plugins.solvers._exponential import between, interpolated, moments, phi
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEIS, DEISSolver, RhoRKSolver
from suite.plugins.solvers.dpm import DPM, DPMSolver
from suite.plugins.solvers.dpmpp_2s import DPMpp2SSolver
from suite.plugins.solvers.dpmpp_3m import DPMpp3MSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.plugins.solvers.pndm import PNDMSolver
from suite.plugins.solvers.unipc import UniPC, UniPCSolver
from suite.testing import Mixture, PointMass, drive
from suite.testing.oracles import a_run, log_snr_times, slope

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import COMMON, KINDS, OLD_NUMPY, START, TRAINED, as_time, on_their_grid, predicts

Factory = Callable[[NoiseSchedule], Solver]
SOLVERS: dict[str, Factory] = {
    "dpm-1": lambda n: DPMSolver(n, 1),
    "dpm-2": lambda n: DPMSolver(n, 2),
    "dpm-3": lambda n: DPMSolver(n, 3),
    "dpmpp-2s": DPMpp2SSolver,
    "dpmpp-3m": DPMpp3MSolver,
    "deis-t-2": lambda n: DEISSolver(n, 2, "t"),
    "deis-t-3": lambda n: DEISSolver(n, 3, "t"),
    "deis-t-4": lambda n: DEISSolver(n, 4, "t"),
    "deis-rho-3": lambda n: DEISSolver(n, 3, "rho"),
    "deis-rho-4": lambda n: DEISSolver(n, 4, "rho"),
    "deis-log-rho-2": lambda n: DEISSolver(n, 2, "log-rho"),
    "deis-log-rho-4": lambda n: DEISSolver(n, 4, "log-rho"),
    "deis-rho-rk-3": lambda n: RhoRKSolver(n, 3),
    "deis-rho-rk-4": lambda n: RhoRKSolver(n, 4),
    "unip-1": lambda n: UniPCSolver(n, 1, "bh2", False),
    "unip-2": lambda n: UniPCSolver(n, 2, "bh1", False),
    "unip-3": lambda n: UniPCSolver(n, 3, "bh2", False),
    "unipc-1": lambda n: UniPCSolver(n, 1, "bh2", True),
    "unipc-2": lambda n: UniPCSolver(n, 2, "bh1", True),
    "unipc-3": lambda n: UniPCSolver(n, 3, "bh2", True),
    "pndm": lambda n: PNDMSolver(n, "runge-kutta"),
    "ipndm": lambda n: PNDMSolver(n, "lower-order"),
}


# ---- exactness, and what diffusers leaves out ---------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_any_epsilon_that_is_constant_is_solved_exactly(name: str) -> None:
    noise, point = Flow(), PointMass(0.7)
    times = torch.linspace(0.9, 0.2, 7, dtype=torch.float64)
    x = point.flow_map(noise, START, 1.0, times[0])
    got = drive(SOLVERS[name](noise), times, point.denoiser(noise), x)
    torch.testing.assert_close(got, point.flow_map(noise, x, times[0], times[-1]), rtol=0, atol=1e-12)


def test_without_its_quadratic_term_in_full_3m_is_of_second_order() -> None:
    # k-diffusion and diffusers weigh the second difference by phi_3; the parabola's integral has 2 phi_3.
    noise, target = VPLinear(), Mixture.two()
    steps, errors = (40, 80, 160, 320), {"ours": [], "theirs": []}
    ends = log_snr_times(noise, 1)
    exact = drive(DPMSolver(noise, 3), log_snr_times(noise, 1200), target.denoiser(noise), START)
    for count in steps:
        times = log_snr_times(noise, count)
        for who, half in (("ours", 1.0), ("theirs", 0.5)):
            got = _three_m(noise, target.denoiser(noise), START, times, half)
            errors[who].append(float((got - exact).abs().max()))
    assert len(ends) == 2
    assert slope(steps, errors["theirs"]) == pytest.approx(2, abs=0.15)
    assert slope(steps, errors["ours"]) > 2.7
    times = log_snr_times(noise, 20)
    ours = drive(DPMpp3MSolver(noise), times, target.denoiser(noise), START)
    torch.testing.assert_close(_three_m(noise, target.denoiser(noise), START, times, 1.0, start=1), ours)


def _three_m(noise: NoiseSchedule, denoise: Any, x: Tensor, times: Tensor, part: float, start: int = 40) -> Tensor:
    """DPM-Solver++(3M) written with differences; `part` of the quadratic term; its first two steps are exact ones."""
    lam, past, alpha, sigma = noise.log_snr(times) / 2, [], noise.alpha(times), noise.sigma(times)
    for k in range(len(times) - 1):
        x0 = denoise(x, times[k])
        past = [(lam[k], x0), *past][:3]
        h = lam[k + 1] - lam[k]
        if len(past) < 3 and start > 1:
            x = drive(DPMSolver(noise, 3), _between_times(noise, times[k], times[k + 1], start), denoise, x)
            continue
        first = (past[0][1] - past[1][1]) / (past[0][0] - past[1][0]) if len(past) > 1 else torch.zeros_like(x)
        second = torch.zeros_like(x)
        if len(past) == 3:
            before = (past[1][1] - past[2][1]) / (past[1][0] - past[2][0])
            second = (first - before) / (past[0][0] - past[2][0])
            first = first + second * (past[0][0] - past[1][0])
        x = sigma[k + 1] / sigma[k] * x + alpha[k + 1] * (
            h * phi(1, -h) * x0 + h**2 * phi(2, -h) * first + part * 2 * h**3 * phi(3, -h) * second
        )
    return x


def _between_times(noise: NoiseSchedule, t: Tensor, s: Tensor, count: int) -> Tensor:
    return torch.stack([between(noise, t, s, k / count) for k in range(count)] + [s])


# ---- the integrals -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-20.0, -3.0, -1.0, -0.99, -1e-3, -1e-9, 0.0, 1e-9, 0.5, 1.0, 2.5, 12.0])
def test_phi_is_its_series(order: int, z: float) -> None:
    exact = float(sum(Fraction(z) ** n / math.factorial(n + order) for n in range(120)))
    assert float(phi(order, torch.tensor(z, dtype=torch.float64))) == pytest.approx(exact, rel=1e-12)


def test_weights_integrate_polynomials() -> None:
    nodes = torch.tensor([[0.0, -0.7, -1.9], [0.0, -1.0, -2.0]], dtype=torch.float64)
    h = torch.tensor([0.3, 1.7], dtype=torch.float64)
    for sign in (1, -1):
        weights = interpolated(nodes, moments(h, 3, sign))
        fine = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        for power in range(3):
            kernel = torch.exp(sign * h[:, None] * (1 - fine)) * fine**power
            torch.testing.assert_close((weights * nodes**power).sum(-1), h * kernel.mean(-1), rtol=1e-8, atol=1e-8)


# ---- equality ----------------------------------------------------------------------------------


def test_first_order_of_each_is_ddim() -> None:
    noise, denoise = Flow(), Mixture.two().denoiser(Flow())
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    expected = drive(DDIMSolver(noise, 0.0), times, denoise, START)
    for solver in (
        DPMSolver(noise, 1), UniPCSolver(noise, 1, "bh1", False),
        *(DEISSolver(noise, 1, v) for v in ("t", "rho", "log-rho")),
    ):  # fmt: skip
        torch.testing.assert_close(drive(solver, times, denoise, START), expected, rtol=0, atol=1e-12)


def test_the_corrector_costs_no_evaluation() -> None:
    noise, calls = Flow(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return Mixture.two().denoiser(noise)(x, t)

    times, outs = torch.linspace(1, 0, 9, dtype=torch.float64), []
    for corrector in (True, False):
        calls.clear()
        outs.append(drive(UniPCSolver(noise, 3, "bh2", corrector), times, denoise, START))
        assert len(calls) == 8
    assert not torch.allclose(*outs)


def test_b_of_h_cancels_where_the_system_is_solved() -> None:
    # Only a lone rho is set to 1/2: predictors of order 2, and correctors above order 1.
    noise, denoise = VPLinear(), Mixture.two().denoiser(VPLinear())
    times = log_snr_times(noise, 12)

    def end(order: int, variant: Any) -> Tensor:
        solver, x, state = UniPCSolver(noise, order, variant, False), START, None
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            before = x
            x, state = solver.step(denoise, x, t, s, state, SampleRng((0, 1, 2)))
            if index < order:  # the start has lone rhos of its own
                x = drive(DPMSolver(noise, 3), torch.stack([t, s]), denoise, before)
        return x

    torch.testing.assert_close(end(3, "bh1"), end(3, "bh2"), rtol=0, atol=1e-12)
    assert (end(2, "bh1") - end(2, "bh2")).abs().max() > 1e-6


@pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver. is deprecated:FutureWarning")
@OLD_NUMPY
def test_dpm_2_is_that_of_diffusers() -> None:
    # Of order 3 theirs is another method: it reaches the second stop by its own second-order rule.
    from diffusers import DPMSolverSinglestepScheduler

    theirs: Any = DPMSolverSinglestepScheduler(
        beta_schedule="scaled_linear", solver_order=2, algorithm_type="dpmsolver", prediction_type="epsilon",
        use_exponential_sigmas=True, final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    theirs.set_timesteps(8)
    noise, target, x = VPLinear(), Mixture.two(), START
    times = noise.time_at(-2 * theirs.sigmas[:8].double().log())
    epsilon = target.output(noise, Prediction.EPSILON)
    for index in range(6):
        x = theirs.step(epsilon(x, times[index]), theirs.timesteps[index], x).prev_sample
    # Theirs visits the stops of a step as grid points of their own, equally far apart in half log-SNR.
    got = drive(DPMSolver(noise, 2), times[:7:2], target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


def _interior(theirs: Any, kind: Prediction, solver_of: Factory, steps: int, leave: int) -> None:
    """All but the last `leave` steps, which theirs takes with a lower order."""
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target, x = Mixture.two(), START
    network = target.output(noise, kind)
    for k, t in list(zip(theirs.timesteps, times, strict=False))[: steps - leave]:
        x = theirs.step(network(x, t), k, x).prev_sample
    got = drive(solver_of(noise), times[: steps - leave + 1], target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("order", "variant"), [(1, "bh1"), (2, "bh1"), (2, "bh2"), (3, "bh2")])
def test_unipc_is_that_of_diffusers(kind: Prediction, order: int, variant: Any) -> None:
    from diffusers import UniPCMultistepScheduler

    theirs: Any = UniPCMultistepScheduler(**COMMON, **predicts(kind), solver_order=order, solver_type=variant)
    theirs.set_timesteps(12)
    _interior(theirs, kind, lambda n: UniPCSolver(n, order, variant, True), 12, order)


@OLD_NUMPY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [2, 3])
def test_deis_is_that_of_diffusers(kind: Prediction, order: int) -> None:
    from diffusers import DEISMultistepScheduler

    theirs: Any = DEISMultistepScheduler(**COMMON, **predicts(kind), solver_order=order, solver_type="logrho")
    theirs.set_timesteps(12)
    # Theirs has a polynomial in log rho integrated against d rho, as ours has.
    _interior(theirs, kind, lambda n: DEISSolver(n, order, "log-rho"), 12, order)


@OLD_NUMPY
def test_rho_ab_is_the_lms_of_diffusers() -> None:
    from diffusers import LMSDiscreteScheduler

    theirs: Any = LMSDiscreteScheduler(**COMMON, prediction_type="epsilon")
    theirs.set_timesteps(12)
    noise, times = on_their_grid(theirs.betas, theirs.timesteps)
    target = Mixture.two()
    epsilon, y = target.output(noise, Prediction.EPSILON), START / noise.alpha(times[0])
    for k, t in list(zip(theirs.timesteps, times, strict=False))[:-1]:
        theirs.scale_model_input(y, k)
        y = theirs.step(epsilon(noise.alpha(t) * y, t), k, y, order=4).prev_sample
    got = drive(DEISSolver(noise, 4, "rho"), times[:-1], target.denoiser(noise), START)
    torch.testing.assert_close(got, noise.alpha(times[-2]) * y, rtol=0, atol=1e-5)


def test_rho_rk_of_order_2_is_heun_and_of_order_4_the_classical_rule() -> None:
    noise, target = VPLinear(), Mixture.two()
    times, denoise = torch.linspace(0.9, 0.1, 8, dtype=torch.float64), target.denoiser(noise)
    heun = drive(HeunSolver(noise), times, denoise, START)
    torch.testing.assert_close(drive(RhoRKSolver(noise, 2), times, denoise, START), heun, rtol=0, atol=1e-12)

    def slope_at(y: Tensor, rho: Tensor) -> Tensor:
        u = noise.time_at(-2 * rho.log())
        return (y - denoise(noise.alpha(u) * y, u)) / rho

    for order in (3, 4):
        y = START / noise.alpha(times[0])
        for t, s in itertools.pairwise(times):
            rho, end = (noise.sigma(u) / noise.alpha(u) for u in (t, s))
            h = end - rho
            a = slope_at(y, rho)
            b = slope_at(y + h / 2 * a, rho + h / 2)
            if order == 3:
                c = slope_at(y + h * (2 * b - a), end)
                y = y + h / 6 * (a + 4 * b + c)
            else:
                c = slope_at(y + h / 2 * b, rho + h / 2)
                y = y + h / 6 * (a + 2 * b + 2 * c + slope_at(y + h * c, end))
        got = drive(RhoRKSolver(noise, order), times, denoise, START)
        torch.testing.assert_close(got, noise.alpha(times[-1]) * y, rtol=0, atol=1e-10)


@OLD_NUMPY
def test_pndm_is_that_of_diffusers() -> None:
    from diffusers import PNDMScheduler

    theirs: Any = PNDMScheduler(beta_schedule="scaled_linear", steps_offset=0, set_alpha_to_one=True)
    theirs.set_timesteps(10)
    noise, _ = on_their_grid(theirs.betas, theirs.timesteps)
    target, x = Mixture.two(), START
    epsilon = target.output(noise, Prediction.EPSILON)

    def ours(k: Any) -> Tensor:
        return as_time((float(k) + 1) / TRAINED)[0]

    for k in theirs.timesteps[:-1]:
        x = theirs.step(epsilon(x, ours(k)), int(k), x).prev_sample
    # Theirs lists the stops of its three Runge-Kutta steps, from 900 to 600, as timesteps.
    times = torch.stack([ours(k) for k in range(900, -1, -100)])
    got = drive(PNDMSolver(noise, "runge-kutta"), times, target.denoiser(noise), START)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


# ---- evaluations and options -------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_counts_its_evaluations(order: int) -> None:
    for noise, irregular in ((Flow(), 2), (VPLinear(), 1)):
        assert DPMSolver(noise, order).evaluations(10) == 10 * order - irregular * (order - 1)
        assert RhoRKSolver(noise, order).evaluations(10) == 10 * order - irregular * (order - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPM(4), "dpm: order = 4: expected 1, 2 or 3"),
        (lambda: DEIS(0), "deis: order = 0: expected 1, 2, 3 or 4"),
        (lambda: UniPC(4), "unipc: order = 4: expected 1, 2 or 3"),
    ],
)
def test_orders_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)


def test_history_of_one_run_is_not_that_of_another() -> None:
    noise, denoise = Flow(), Mixture.two().denoiser(Flow())
    for factory in SOLVERS.values():
        solver, times = factory(noise), torch.linspace(1, 0, 9, dtype=torch.float64)
        assert torch.equal(drive(solver, times, denoise, START), drive(solver, times, denoise, START))
        assert solver.init(a_run()) in ((), None)
