"""Solvers that pick their own times: the flow to a tolerance, the law of adaptive steps; and GENIE's derivative."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, TrigFlow, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import SolverFacts
from suite.errors import ConfigError, RuleError
from suite.plugins.solvers._brownian import BrownianPath
from suite.plugins.solvers.dopri5 import Dopri5, Dopri5Solver
from suite.plugins.solvers.genie import GENIESolver
from suite.plugins.solvers.ggf import GGF, GGFSolver
from suite.rules import Member, enforce
from suite.testing import Gaussian, Mixture, drive
from suite.testing.oracles import log_snr_times, reference

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import START, as_time

NOISES = [VPLinear(), Cosine(), VE(10.0), Flow(), TrigFlow()]


# ---- the flow to a tolerance -------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_dopri5_is_the_flow(noise: NoiseSchedule) -> None:
    target, x = Gaussian(), START * float(noise.sigma(1.0))
    for tolerance in (1e-3, 1e-6, 1e-9):
        got = drive(Dopri5Solver(noise, tolerance, 5000), as_time(1.0, 0.0), target.denoiser(noise), x)
        error = float((got - target.flow_map(noise, x, 1.0, 0.0)).abs().max())
        # Local errors add up; at the end x0 takes the place of the last 1e-4 of sigma / (alpha + sigma).
        assert error < 50 * tolerance + 2e-7


def test_dopri5_is_the_reference_where_the_denoiser_is_not_affine() -> None:
    noise, target = Flow(), Mixture.two()
    t, s = log_snr_times(noise, 1)
    got = drive(Dopri5Solver(noise, 1e-9, 5000), torch.stack([t, s]), target.denoiser(noise), START)
    torch.testing.assert_close(got, reference(target, noise, START, t, s), rtol=0, atol=1e-7)


def test_forward_and_back_is_the_identity() -> None:
    # The same flow upwards, by the reference integrator, from where dopri5 arrived.
    noise, target = VPLinear(), Mixture.two()
    t, s = log_snr_times(noise, 1)
    down = drive(Dopri5Solver(noise, 1e-9, 5000), torch.stack([t, s]), target.denoiser(noise), START)
    torch.testing.assert_close(reference(target, noise, down, s, t), START, rtol=0, atol=1e-5)


def test_a_limit_is_a_limit() -> None:
    with pytest.raises(ConfigError, match="dopri5 needs more than its limit of 20 evaluations"):
        drive(Dopri5Solver(Flow(), 1e-9, 20), as_time(1.0, 0.0), Gaussian().denoiser(Flow()), START)
    with pytest.raises(ConfigError, match="ggf needs more than its limit of 20 evaluations"):
        drive(GGFSolver(Flow(), 0.05, 0.01, 20), as_time(1.0, 0.0), Gaussian().denoiser(Flow()), START)


def test_adaptive_solvers_take_one_time_for_all() -> None:
    times = as_time(1.0, 0.0)[:, None].expand(-1, 2)
    for solver in (Dopri5Solver(Flow(), 1e-3, 100), GGFSolver(Flow(), 0.05, 0.01, 100)):
        with pytest.raises(ConfigError, match="a schedule without per-group times"):
            drive(solver, times, Gaussian().denoiser(Flow()), START)


@pytest.mark.parametrize("plugin", [Dopri5(), GGF()], ids=["dopri5", "ggf"])
@pytest.mark.parametrize(
    ("hook", "words"), [("schedule", "optimised-grid"), ("cache", "needs-fixed-grid"), ("cache", "step-reuse")]
)
def test_what_needs_a_grid_is_refused_beside_a_solver_that_has_none(plugin: Any, hook: str, words: str) -> None:
    # From words alone: before a model is loaded, let alone evaluated.
    chain = [Member("solver", "solver", plugin.effects), Member("other", hook, frozenset({words}))]
    with pytest.raises(RuleError, match="solver with other: the solver picks its own times"):
        enforce(chain)


# ---- one Brownian path -------------------------------------------------------------------------


class _Probe:
    """Draw number k is one in entry k and zero elsewhere, so a path's values are its weights of the draws."""

    def __init__(self, count: int) -> None:
        self.count, self.drawn = count, 0

    def __call__(self) -> Tensor:
        out = torch.zeros(self.count, dtype=torch.float64)
        out[self.drawn % self.count] = 1.0
        self.drawn += 1
        return out


@pytest.mark.parametrize("order", [(0.4, 1.0, 2.5), (1.0, 0.4, 2.5), (2.5, 0.4, 1.0), (2.5, 1.0, 0.4)])
def test_the_path_has_brownian_covariance_in_whatever_order_it_is_looked_at(order: tuple[float, ...]) -> None:
    path = BrownianPath(_Probe(8))
    values = torch.stack([dict((p, path.at(p)) for p in order)[p] for p in sorted(order)])
    places = torch.tensor(sorted(order), dtype=torch.float64)
    torch.testing.assert_close(values @ values.T, torch.minimum(places[:, None], places))
    assert torch.equal(path.at(1.0), path.at(1.0))
    path.forget(1.0)
    torch.testing.assert_close(path.at(2.5), values[-1])


def _walk(count: int, redraw: bool) -> Tensor:
    """W(1) by steps of 1/2 that are halved, once, where the increment is large; [count]."""
    out = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        path, here, total = BrownianPath(lambda: torch.randn((), generator=generator)), 0.0, torch.zeros(())
        while here < 1:
            step = 0.5 if here in (0.0, 0.5) else 0.25
            change = path.at(here + step) - path.at(here)
            if step == 0.5 and abs(float(change)) > 0.5:
                step = 0.25
                if redraw:
                    path = BrownianPath(lambda: torch.randn((), generator=generator))
                    path.at(here)
                change = path.at(here + step) - path.at(here)
            total, here = total + change, here + step
        out.append(total)
    return torch.stack(out)


def test_a_rejected_step_must_not_draw_again() -> None:
    # Rejection picks large increments; the path keeps them, fresh noise forgets them and the variance shrinks.
    count = 3000
    error = 4 * math.sqrt(2 / count)
    assert float(_walk(count, False).var()) == pytest.approx(1.0, rel=error)
    assert float(_walk(count, True).var()) < 1 - error


# ---- Gotta Go Fast -----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [VPLinear(), Flow(), VE(10.0)], ids=lambda n: n.family)
def test_the_law_of_adaptive_steps(noise: NoiseSchedule) -> None:
    target, samples, size = Gaussian(), 12, 500
    rng = SampleRng(range(samples))
    x = float(noise.sigma(1.0)) * rng.normal((size,)).double()
    got = drive(GGFSolver(noise, 0.02, 0.002, 3000), as_time(1.0, 0.0), target.denoiser(noise), x, rng=rng)
    count = samples * size
    # Four standard errors, in which what the steps leave at this tolerance (up to 2 %) is included.
    assert float(got.mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.25 / count))
    assert float(got.var()) == pytest.approx(0.25, rel=4 * math.sqrt(2 / count))


def test_tighter_is_better_and_dearer() -> None:
    noise, target = VPLinear(), Gaussian()
    rng, results = SampleRng(range(4)), []
    x = rng.normal((1000,)).double()
    for relative in (1.0, 0.1, 0.01):
        calls = []

        def counted(x: Tensor, t: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(t)
            return target.denoiser(noise)(x, t)

        solver = GGFSolver(noise, relative, relative / 10, 5000)
        got = drive(solver, as_time(1.0, 0.0), counted, x, seeds=range(4))
        results.append((len(calls), abs(float(got.var()) - 0.25)))
    assert results[0][0] < results[1][0] < results[2][0]
    assert results[0][1] > results[1][1] and results[0][1] > results[2][1]


def test_every_sample_has_its_own_steps() -> None:
    noise = VPLinear()
    hard, easy = Mixture.two((3,)), Gaussian(0.0, 1.0)
    times: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        both = [d(x[i : i + 1], t if t.ndim == 0 else t[i : i + 1]) for i, d in enumerate((hard_one, easy_one))]
        return torch.cat(both)

    hard_one, easy_one = hard.denoiser(noise), easy.denoiser(noise)
    start = SampleRng((4, 5)).normal((3,)).double()
    together = drive(GGFSolver(noise, 0.05, 0.01, 3000), as_time(1.0, 0.0), denoise, start, seeds=(4, 5))
    assert any(t.ndim == 1 and float(t[0]) != float(t[1]) for t in times)
    for index, alone in enumerate((hard_one, easy_one)):
        rows = slice(index, index + 1)
        got = drive(GGFSolver(noise, 0.05, 0.01, 3000), as_time(1.0, 0.0), alone, start[rows], seeds=(4 + index,))
        torch.testing.assert_close(together[rows], got, rtol=0, atol=1e-9)


# ---- GENIE -------------------------------------------------------------------------------------


def test_genie_costs_one_derivative() -> None:
    assert GENIESolver(Flow()).facts == SolverFacts(order=2, evaluations=2)


def test_genies_derivative_is_that_of_differences() -> None:
    noise, denoise = Cosine(), Mixture.two().denoiser(Cosine())
    t, s = as_time(0.6, 0.5)

    def slope(x: Tensor, u: Tensor) -> Tensor:
        return (x / noise.alpha(u) - denoise(x, u)) / (noise.sigma(u) / noise.alpha(u))

    rho = noise.sigma(t) / noise.alpha(t)
    step, y, first = 1e-4, START / noise.alpha(t), slope(START, t)
    nearby = []
    for sign in (1, -1):
        u = noise.time_at(-2 * (rho + sign * step).log())
        nearby.append(slope((y + sign * step * first) * noise.alpha(u), u))
    second = (nearby[0] - nearby[1]) / (2 * step)
    h = noise.sigma(s) / noise.alpha(s) - rho
    expected = noise.alpha(s) * (y + h * first + h**2 / 2 * second)
    with torch.inference_mode():  # as the engine calls it
        got, _ = GENIESolver(noise).step(denoise, START, t, s, None, SampleRng((0, 1, 2)))
    torch.testing.assert_close(got.clone(), expected, rtol=0, atol=1e-7)


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dopri5(tolerance=1.0), "dopri5: tolerance = 1.0: expected a number from 1e-12 to 0.1"),
        (lambda: Dopri5(limit=1), "dopri5: limit = 1: expected at least 6"),
        (lambda: GGF(relative=0.0), "ggf: relative = 0.0: expected a number above 0"),
        (lambda: GGF(absolute=-1.0), "ggf: absolute = -1.0"),
        (lambda: GGF(limit=1), "ggf: limit = 1: expected at least 2"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)
