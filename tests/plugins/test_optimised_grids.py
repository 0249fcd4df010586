"""Methods that fit grids, against the closed forms of Gaussian data and against brute force."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Flow, Masked, NoiseSchedule, VPLinear
from suite.diffusion.schedule import check_timesteps
from suite.diffusion.solver import Denoise, Solver
from suite.errors import ConfigError
from suite.fitting.grid_fit import GridProblem
from suite.plugins.schedules.ays import AYS as Tables
from suite.plugins.schedules.ays import TABLES, TableTimes, position
from suite.plugins.schedules.optimize._curves import differences, errors, forward_noise, nodes, snr
from suite.plugins.schedules.optimize._path import best_path
from suite.plugins.schedules.optimize.ays import AYS, klub_costs
from suite.plugins.schedules.optimize.dm import DM, amplifications, bound
from suite.plugins.schedules.optimize.dp import DP, bound_costs
from suite.plugins.schedules.optimize.search import Search, evolve
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.testing.oracles import Gaussian, Tokens, a_run, drive

C, LOW, HIGH, STEPS = 0.5, 0.002, 80.0, 8
"""The survey's example: N(0, 0.25), sigma from 80 to 0.002, eight steps."""


def squared_error(sigma: Tensor) -> Tensor:
    """E |x0 - D(x)|^2 of the exact denoiser of N(0, C^2) at sigma, variance exploding."""
    return C**2 * sigma**2 / (C**2 + sigma**2)


def klub(sigmas: Tensor) -> float:
    """KLUB of a grid (rising) in closed form: sum int (m(t_i) - m(t)) / t^3 dt."""

    def primitive(t: Tensor, end: Tensor) -> Tensor:
        exact = -1 / (2 * C**2 * t**2) - t.log() / C**4 + (C**2 + t**2).log() / (2 * C**4)
        return C**4 * (exact + 1 / (2 * (C**2 + end**2) * t**2))

    pairs = itertools.pairwise(sigmas)
    return float(sum(primitive(b, b) - primitive(a, b) for a, b in pairs))


def table(levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (falling), SNR, and E |D(x_i) - D(x_j)|^2 = |m_i - m_j|, which holds for an exact denoiser."""
    sigmas = torch.linspace(math.log(HIGH), math.log(LOW), levels, dtype=torch.float64).exp()
    m = squared_error(sigmas)
    return sigmas, sigmas**-2, (m[:, None] - m[None]).abs()


# ---- Align Your Steps and dynamic programming --------------------------------------------------


def test_klub_of_grids_that_are_known() -> None:
    even = torch.linspace(math.log(LOW), math.log(HIGH), STEPS + 1, dtype=torch.float64).exp()
    karras = torch.linspace(LOW ** (1 / 7), HIGH ** (1 / 7), STEPS + 1, dtype=torch.float64) ** 7
    assert klub(even) == pytest.approx(18.6, abs=0.05)
    assert klub(karras) == pytest.approx(100.2, abs=0.05)


def test_klub_optimum() -> None:
    sigmas, ratio, away = table(600)
    path, total = best_path(klub_costs(away, ratio), STEPS)
    found = klub(sigmas[path].flip(0))
    assert found == pytest.approx(6.38, abs=0.02)
    assert total == pytest.approx(found, rel=2e-3)  # the trapezoid rule over 600 levels


def test_a_small_move_of_any_stop_makes_it_worse() -> None:
    sigmas, ratio, away = table(600)
    path, _ = best_path(klub_costs(away, ratio), STEPS)
    best = klub(sigmas[path].flip(0))
    for stop, by in itertools.product(range(1, STEPS), (-3, 3)):
        moved = [p + by * (k == stop) for k, p in enumerate(path)]
        assert klub(sigmas[moved].flip(0)) > best


def test_with_the_exact_denoiser_dp_is_ays() -> None:
    # The evidence bound of n jumps exceeds that of infinitely many by KLUB: the same path, a constant apart.
    sigmas, ratio, away = table(300)
    noise = VE(sigma_max=HIGH, power=1.0)
    times = sigmas / HIGH
    by_klub, first = best_path(klub_costs(away, ratio), STEPS)
    by_bound, second = best_path(bound_costs(noise, times, squared_error(sigmas)), STEPS)
    m = squared_error(sigmas)
    continuous = float(((m[1:] + m[:-1]) / 2 * ratio.diff()).sum() / 2)
    assert by_klub == by_bound
    assert second - continuous == pytest.approx(first, rel=1e-9)


def test_deterministic_euler_is_best_at_equal_angles() -> None:
    # AYS' first example: Euler on N(0, c^2) multiplies the deviation by prod cos of the angle's steps, at best equal.
    target, noise, steps = Gaussian(0.0, C**2), VE(sigma_max=HIGH, power=1.0), 6
    angles = torch.linspace(math.atan(HIGH / C), math.atan(0.02 / C), steps + 1, dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)

    def deviation(angles: Tensor) -> float:
        times = (C * angles.tan() / HIGH).clamp(max=1)
        gain = float(drive(DDIMSolver(noise, 0.0), times, target.denoiser(noise), x))
        exact = float(target.flow_map(noise, x, times[0], times[-1]))
        return gain / exact

    best = deviation(angles)
    assert best == pytest.approx(math.cos(float(angles[0] - angles[1])) ** steps, rel=1e-12)
    for stop, by in itertools.product(range(1, steps), (-0.01, 0.01)):
        moved = angles.clone()
        moved[stop] += by
        assert deviation(moved) < best  # further below 1: a larger error


@pytest.mark.parametrize(("count", "steps"), [(7, 1), (7, 3), (9, 4), (12, 5), (12, 11)])
def test_best_path_is_brute_force(count: int, steps: int) -> None:
    costs = torch.rand(count, count, generator=torch.Generator().manual_seed(count * steps), dtype=torch.float64)
    inner = itertools.combinations(range(1, count - 1), steps - 1)
    sums = {p: sum(float(costs[a, b]) for a, b in itertools.pairwise((0, *p, count - 1))) for p in inner}
    best = min(sums, key=lambda p: sums[p])
    path, total = best_path(costs, steps)
    assert path == [0, *best, count - 1] and total == pytest.approx(sums[best], abs=1e-12)


def test_more_steps_are_never_worse_and_all_steps_are_the_whole_bound() -> None:
    sigmas, _, _ = table(24)
    costs = bound_costs(VE(sigma_max=HIGH, power=1.0), sigmas / HIGH, squared_error(sigmas))
    totals = [best_path(costs, steps)[1] for steps in range(1, 24)]
    assert all(a > b for a, b in itertools.pairwise(totals))
    assert totals[-1] == pytest.approx(float(costs.diagonal(1).sum()), rel=1e-12)
    with pytest.raises(ConfigError, match="take more levels"):
        best_path(costs, 24)


# ---- measuring a model -------------------------------------------------------------------------


@dataclass
class Exact:
    """`GridProblem` of data whose denoiser is known; two parts, of which each is asked from noisy to clean."""

    noise: NoiseSchedule
    solver: Solver
    denoise: Denoise
    x0: Tensor
    steps: int = 6
    mask_token: int | None = None
    own: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.own = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64) ** 2

    def passes(self, title: str, calls: int) -> Iterator[tuple[Tensor, Denoise, torch.Generator]]:
        for number, part in enumerate(self.x0.chunk(2)):
            asked: list[float] = []

            def denoise(x: Tensor, t: Tensor, asked: list[float] = asked) -> Tensor:
                asked.append(float(t))
                return self.denoise(x, t)

            yield part, denoise, torch.Generator().manual_seed(number)
            assert len(asked) == calls and asked == sorted(asked, reverse=True), title

    def error(self, times: Tensor) -> float:
        x = torch.tensor([[-1.3], [0.4], [1.9]], dtype=torch.float64)
        got = drive(self.solver, times, self.denoise, x)
        want = drive(self.solver, torch.linspace(1, 0, 401, dtype=torch.float64), self.denoise, x)
        return float((got - want).square().mean().sqrt())


def gaussian(noise: NoiseSchedule, solver: Solver | None = None, steps: int = 6, count: int = 4) -> Exact:
    target = Gaussian(0.7, 0.25)
    rng = torch.Generator().manual_seed(5)
    x0 = 0.7 + 0.5 * torch.randn(count, 4096, generator=rng, dtype=torch.float64)
    return Exact(noise, solver or DDIMSolver(noise, 0.0), target.denoiser(noise), x0, steps)


def test_the_forward_path_has_its_marginals_and_its_correlations() -> None:
    noise, times = Flow(), nodes(Flow(), 6, 9.0, 0.1)
    x0 = torch.zeros(1, 200_000, dtype=torch.float64)
    states = forward_noise(x0, times, noise, torch.Generator().manual_seed(0))
    e = torch.stack([x[0] / float(noise.sigma(t)) for x, t in zip(states, times, strict=True)])
    ratio = torch.exp(-noise.log_snr(times) / 2)
    expected = (ratio[1:, None] / ratio[None, 1:]).minimum(ratio[None, 1:] / ratio[1:, None])
    got = torch.corrcoef(e)
    bar = 4 / math.sqrt(200_000)  # four standard errors of a correlation
    torch.testing.assert_close(got[1:, 1:], expected, rtol=0, atol=bar)
    assert float(got[0, 1:].abs().max()) < bar  # the prior knows nothing
    torch.testing.assert_close(e.var(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=4 * math.sqrt(2 / 200_000))


@pytest.mark.parametrize("noise", [Flow(), VPLinear()], ids=lambda n: n.family)
def test_measured_errors_and_differences_are_those_of_the_closed_form(noise: NoiseSchedule) -> None:
    problem = gaussian(noise, count=16)
    times = nodes(noise, 12, 20.0, 0.05)
    ratio = snr(noise, times)
    exact = 0.25 / (0.25 * ratio + 1)
    samples = problem.x0.numel()
    torch.testing.assert_close(errors(problem, times), exact, rtol=4 * math.sqrt(2 / samples), atol=0)
    away = differences(problem, times)
    expected = (exact[:, None] - exact[None]).abs()
    torch.testing.assert_close(away, expected, rtol=0.04, atol=1e-6)
    assert torch.equal(away, away.T) and not away.diagonal().any()


@pytest.mark.parametrize("method", [AYS(levels=64), DP(levels=64)], ids=["ays", "dp"])
@pytest.mark.parametrize("noise", [Flow(), VPLinear(), VE()], ids=lambda n: n.family)
def test_fitted_from_samples_is_near_the_optimum(method: Any, noise: NoiseSchedule) -> None:
    fitted = method.fit(gaussian(noise))
    times = torch.tensor(fitted.times, dtype=torch.float64)
    check_timesteps(times, 6)
    fine = nodes(noise, 400, 50.0, 0.02)
    ratio = snr(noise, fine)
    exact = 0.25 / (0.25 * ratio + 1)
    costs = bound_costs(noise, fine, exact)
    _, best = best_path(costs, 6)
    stops = snr(noise, torch.cat([times[:-1], fine[-1:]]))
    got = float((stops.diff() * 0.25 / (0.25 * stops[:-1] + 1)).sum() / 2)
    assert got <= best * 1.02
    even = nodes(noise, 7, 50.0, 0.02)
    spread = snr(noise, even)
    assert got < float((spread.diff() * 0.25 / (0.25 * spread[:-1] + 1)).sum() / 2)


def test_dp_for_tokens_is_the_bound_of_masked_tokens() -> None:
    # Independent tokens: the surprise of the masked ones is their number times the entropy, so every step costs what
    # it uncovers and all grids are equal; what is measured must say so.
    noise, tokens = Masked(), Tokens.random(64, 5)
    rows = [torch.multinomial(p, 256, True, generator=torch.Generator().manual_seed(k)) for k, p in
            enumerate(tokens.probabilities)]  # fmt: skip
    problem = Exact(noise, DDIMSolver(noise, 0.0), tokens.denoiser(noise), torch.stack(rows, 1), 4, 4)
    times = nodes(noise, 9, 50.0, 0.02)
    surprise = errors(problem, times)
    p = tokens.probabilities
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean()
    torch.testing.assert_close(surprise, entropy * (1 - noise.alpha(times)), rtol=0, atol=0.02)
    costs = bound_costs(noise, times, entropy * (1 - noise.alpha(times)))
    for steps in (1, 3, 8):
        assert best_path(costs, steps)[1] == pytest.approx(float(entropy), rel=1e-9)
    fitted = DP(levels=9).fit(problem)
    check_timesteps(torch.tensor(fitted.times, dtype=torch.float64), 4)


# ---- DM-NonUniform -----------------------------------------------------------------------------


def paper_error(noise: NoiseSchedule) -> Any:
    return lambda t: noise.sigma(t) ** 2 / noise.alpha(t)


def test_amplifications_of_first_order_are_the_exponential_weights() -> None:
    # x_n / sigma_n = x_0 / sigma_0 + sum (e^lam_(j+1) - e^lam_j) D_j for DDIM.
    noise = VPLinear()
    times = nodes(noise, 8, 20.0, 0.05)[1:]
    weights, asked = amplifications(DDIMSolver(noise, 0.0), times)
    grown = (noise.log_snr(times) / 2).exp()
    torch.testing.assert_close(weights / noise.sigma(times[-1]), grown.diff(), rtol=1e-10, atol=0)
    torch.testing.assert_close(asked, times[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda n: DDIMSolver(n, 0.0), DPMpp2MSolver, HeunSolver], ids=["ddim", "2m", "heun"])
def test_amplifications_rebuild_the_solver(make: Any) -> None:
    # The last state is linear in the answers: the weights and the answers of a nonlinear denoiser give it back.
    noise = Flow()
    solver, times = make(noise), torch.linspace(0.9, 0.1, 6, dtype=torch.float64)
    answers: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        answers.append(torch.tanh(3 * x + t))
        return answers[-1]

    got = drive(solver, times, denoise, torch.zeros(1, 1, dtype=torch.float64))
    weights, asked = amplifications(solver, times)
    assert len(answers) == len(asked)
    torch.testing.assert_close(got, sum(w * a for w, a in zip(weights, answers, strict=True)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["log-snr", "time"])
@pytest.mark.parametrize("make", [lambda n: DDIMSolver(n, 0.0), DPMpp2MSolver], ids=["ddim", "2m"])
def test_dm_is_below_what_it_starts_from(make: Any, start: Any) -> None:
    noise = VPLinear()
    problem = gaussian(noise, make(noise), steps=5)
    fitted = DM(start=start).fit(problem)
    check_timesteps(torch.tensor(fitted.times, dtype=torch.float64), 5)
    bounds = fitted.facts["bounds"]
    assert fitted.objective == min(bounds.values()) and fitted.objective < 0.995 * bounds["log-snr"]
    assert fitted.objective <= bounds["time"]
    edges = nodes(noise, 3, 50.0, 0.02)
    ends = torch.cat([edges[1:2], torch.tensor(fitted.times[1:-1], dtype=torch.float64), edges[2:]])
    assert bound(problem.solver, noise, ends, paper_error(noise)) == pytest.approx(fitted.objective, rel=1e-9)
    lam = noise.log_snr(ends) / 2
    for stop, by in itertools.product(range(1, 5), (-0.02, 0.02)):
        moved = lam.clone()
        moved[stop] += by
        there = bound(problem.solver, noise, noise.time_at(2 * moved), paper_error(noise))
        assert there > fitted.objective * (1 - 1e-4)


def test_dm_can_take_the_models_own_errors() -> None:
    fitted = DM(error="model", levels=16).fit(gaussian(Flow(), steps=4))
    assert fitted.objective <= fitted.facts["bounds"]["log-snr"]


# ---- AutoDiffusion -----------------------------------------------------------------------------


def test_the_search_finds_the_optimum_of_a_convex_fitness() -> None:
    wanted = (3, 11, 17)

    def fitness(genes: tuple[int, ...]) -> float:
        return float(sum((a - b) ** 2 for a, b in zip(genes, wanted, strict=True)))

    best, value, history = evolve(fitness, 20, 3, generations=25, seed=1)
    brute = min(itertools.combinations(range(20), 3), key=fitness)
    assert best == brute == wanted and value == 0
    assert all(a >= b for a, b in itertools.pairwise(history)), "the best was lost"


def test_the_search_is_never_worse_than_its_founders_and_judges_nothing_twice() -> None:
    seen: list[tuple[int, ...]] = []
    founder = (0, 5, 9)

    def fitness(genes: tuple[int, ...]) -> float:
        seen.append(genes)
        assert len(genes) == 3 and list(genes) == sorted(set(genes)) and genes[-1] < 10
        return float(hash(genes) % 997) if genes != founder else -1.0

    best, value, _ = evolve(fitness, 10, 3, (founder,), generations=6)
    assert (best, value) == (founder, -1.0) and len(seen) == len(set(seen))


def test_a_small_pool_is_searched_whole() -> None:
    best, _, _ = evolve(lambda genes: float(sum(genes)), 4, 2, generations=4)
    assert best == (0, 1)
    assert evolve(lambda genes: 0.0, 4, 0)[0] == ()
    with pytest.raises(ConfigError, match="take more levels"):
        evolve(lambda genes: 0.0, 4, 5)


def test_search_is_at_least_as_good_as_even_grids() -> None:
    noise = Flow()
    problem = gaussian(noise, steps=4)
    fitted = Search(levels=24, population=8, generations=4).fit(problem)
    check_timesteps(torch.tensor(fitted.times, dtype=torch.float64), 4)
    assert fitted.objective == pytest.approx(problem.error(torch.tensor(fitted.times, dtype=torch.float64)))
    places = nodes(noise, 25, 100.0, 0.01)[1:]
    even = torch.cat([places.new_ones(1), places[[0, 12, 23]], places.new_zeros(1)])
    assert fitted.objective <= problem.error(even)
    lam = noise.log_snr(places)
    own = places[[int((lam - stop).abs().argmin()) for stop in noise.log_snr(problem.own[1:-1])]]
    assert fitted.objective <= problem.error(torch.cat([own.new_ones(1), own, own.new_zeros(1)]))


def test_the_problem_is_one_the_methods_accept() -> None:
    problem: GridProblem = gaussian(Flow())
    assert problem.steps == 6


@pytest.mark.parametrize("method", [AYS(), DM(), Search()], ids=lambda m: type(m).__name__)
def test_tokens_are_refused_with_a_way_out(method: Any) -> None:
    noise = Masked()
    problem = Exact(noise, DDIMSolver(noise, 0.0), Tokens.random().denoiser(noise), torch.zeros(2, 6).long(), 4, 4)
    with pytest.raises(ConfigError, match="method dp"):
        method.fit(problem)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AYS, {"levels": 4}),
        (AYS, {"low": 99.0}),
        (DP, {"high": 1e9}),
        (DM, {"power": 0.0}),
        (DM, {"low": 0.0}),
        (DM, {"levels": 3}),
        (Search, {"population": 1}),
        (Search, {"generations": 0}),
    ],
)
def test_bad_options_are_refused(cls: type, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^[a-z]+: .*expected"):
        cls(**options)


# ---- the published tables ----------------------------------------------------------------------


def test_tables_are_those_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_utils import AysSchedules

    for name, theirs in (("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        assert [*TABLES[name], 0.0] == AysSchedules[f"{theirs}Sigmas"]


@pytest.mark.parametrize("name", TABLES)
def test_ten_steps_are_the_table(name: Any) -> None:
    noise = VE(sigma_max=800.0)
    times = Tables(name).schedule(noise=noise, run=a_run()).timesteps(noise, 10)
    np.testing.assert_allclose(noise.sigma(times[1:-1]), TABLES[name][1:], rtol=1e-9)
    check_timesteps(times, 10)


@pytest.mark.parametrize("steps", [5, 19, 37])
def test_other_steps_are_log_linear(steps: int) -> None:
    # NVIDIA's recipe: interpolate log sigma over even places.
    noise = VE(sigma_max=800.0)
    sigma = noise.sigma(TableTimes(TABLES["sd"]).timesteps(noise, steps))[1:-1]
    places = np.linspace(0, 1, steps)
    expected = np.exp(np.interp(places, np.linspace(0, 1, 10), np.log(TABLES["sd"])))
    np.testing.assert_allclose(sigma, expected[1:], rtol=1e-9)


def test_a_model_with_less_noise_begins_where_it_can() -> None:
    assert position(TABLES["sd"], 14.615) == 0 and position(TABLES["sd"], 99.0) == 0
    assert position(TABLES["sd"], 0.0) == 9 and position(TABLES["sd"], 2.697) == pytest.approx(3)
    noise = VE(sigma_max=2.697)
    sigma = noise.sigma(TableTimes(TABLES["sd"]).timesteps(noise, 7))
    np.testing.assert_allclose(sigma[:-1], TABLES["sd"][3:], rtol=1e-9)


def test_tables_are_refused_for_tokens() -> None:
    with pytest.raises(ConfigError, match="use --schedule uniform"):
        Tables().schedule(noise=Masked(), run=a_run())
