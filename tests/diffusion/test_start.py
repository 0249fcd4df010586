"""Starts below t = 1: what they cut, what they leave, and each published kind of start as a few lines."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.noise import VE, Cosine, Flow, Masked, NoiseSchedule, Sqrt, TrigFlow, Uniform, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.diffusion.start import Start, begin, diffuse, noised, observed, share_of, truncated
from suite.errors import ConfigError
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEIS
from suite.plugins.solvers.dpmpp_2m import DPMpp2M
from suite.plugins.solvers.dpmpp_3m import DPMpp3M
from suite.plugins.solvers.heun import Heun
from suite.plugins.solvers.mdlm import MDLMSolver
from suite.plugins.solvers.pndm import PNDM
from suite.plugins.solvers.unipc import UniPC
from suite.testing.oracles import Gaussian, Mixture, Tokens, a_run, affine_step, law, moments

NOISES = [VPLinear(), Cosine(), Sqrt(), VE(), Flow(), TrigFlow()]
STEPS = 10
BY_FAMILY = pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)


@dataclass
class Told:
    """A denoiser as the sampler calls it, which keeps the calls."""

    denoise_at: Denoise
    calls: list[Call]

    def denoise(self, x: Tensor, t: Tensor, cond: Any, call: Call) -> Tensor:
        self.calls.append(call)
        return self.denoise_at(x, t)


def problem(
    noise: NoiseSchedule,
    solver: Solver,
    denoise: Denoise,
    x: Tensor,
    seeds: Sequence[int] | None = None,
    **changes: Any,
) -> Problem:
    """A plain run of ten even steps."""
    seeds = tuple(range(x.shape[0])) if seeds is None else tuple(seeds)
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    run = a_run(steps=STEPS, batch=len(seeds), seeds=seeds)
    return replace(Problem(x, times, Told(denoise, []), {}, solver, noise, SampleRng(seeds), run), **changes)


def calls(p: Problem) -> list[Call]:
    assert isinstance(p.denoiser, Told)
    return p.denoiser.calls


def normal(rows: int = 3) -> Tensor:
    return SampleRng(range(rows)).normal((2,)).double()


def at(value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, 1), value, dtype=torch.float64)


# ---- what is cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "share", "left"),
    [(10, 0.0, 0), (10, 1.0, 10), (10, 0.6, 6), (10, 0.7, 7), (10, 0.65, 6), (10, 0.99, 9), (10, 0.01, 1), (3, 0.5, 1),
     (1, 0.0, 0), (1, 1.0, 1), (1000, 0.29, 290)],
)  # fmt: skip
def test_a_share_of_the_steps(steps: int, share: float, left: int) -> None:
    assert share_of(steps, share) == left
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = Start(noised(at(0)), share=share).times(grid)
    assert torch.equal(times, grid[steps - left :])


@pytest.mark.slow
def test_the_share_is_that_of_diffusers_pictures() -> None:
    """StableDiffusionImg2ImgPipeline.get_timesteps; where it would run no step at all, it refuses, and we run one."""
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img")
    scheduler = pytest.importorskip("diffusers").DDIMScheduler()
    pipe = type("Pipe", (), {"scheduler": scheduler})()
    for steps, share in itertools.product((5, 10, 50), (0.25, 0.3, 0.5, 0.75, 0.8, 1.0)):
        scheduler.set_timesteps(steps)
        _, theirs = module.StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, share, "cpu")
        assert share_of(steps, share) == theirs


def test_one_step_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="raise --steps"):
        share_of(1, 0.5)


@pytest.mark.parametrize(
    ("time", "expected"),
    [(0.5, [0.5, 0.25, 0]), (0.6, [0.6, 0.5, 0.25, 0]), (1.0, [1, 0.75, 0.5, 0.25, 0]), (0.0, [0])],
)
def test_a_time_of_its_own_stands_before_the_rest_of_the_grid(time: float, expected: list[float]) -> None:
    times = Start(noised(at(0)), time=time).times(torch.linspace(1, 0, 5, dtype=torch.float64))
    assert times.tolist() == expected


@pytest.mark.parametrize("options", [{}, {"share": 0.5, "time": 0.5}, {"share": 1.1}, {"time": -0.1}])
def test_a_start_is_at_one_place(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="start"):
        Start(noised(at(0)), **options)


# ---- the ends ----------------------------------------------------------------------------------------------------


@BY_FAMILY
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_strength_0_is_the_input_and_1_the_plain_run(noise: NoiseSchedule, eta: float) -> None:
    target, solver = Mixture.two((2,)), DDIMSolver(noise, eta)
    x0 = normal(1) / 3
    plain = march(problem(noise, solver, target.denoiser(noise), normal()))
    whole = problem(noise, solver, target.denoiser(noise), normal())
    assert begin(whole, Start(noised(x0), share=1.0)) is whole
    assert torch.equal(march(begin(whole, Start(noised(x0), share=1.0))), plain)
    none = begin(problem(noise, solver, target.denoiser(noise), normal()), Start(noised(x0), share=0.0))
    if float(noise.sigma(0.0)) == 0:
        assert torch.equal(march(none), x0.expand(3, 2))
    assert not calls(none)


def test_what_is_left_of_an_adaptive_solver_at_strength_0_is_the_input() -> None:
    from suite.plugins.solvers._tokens import Draw
    from suite.plugins.solvers.first_hitting import FirstHittingSolver

    target = Tokens.random()
    p = problem(
        Masked(), FirstHittingSolver(Masked(), Draw()), target.denoiser(Masked()), target.prior(SampleRng((0,)))
    )
    x0 = torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert torch.equal(march(begin(p, Start(noised(x0, 4), share=0.0))), x0)


# ---- solvers after a start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plugin", [DPMpp2M(), DPMpp3M(), DEIS(), UniPC(), PNDM(), Heun()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_solver_starts_afresh(plugin: Any, share: float) -> None:
    """History is empty, steps count from 0, and the run says how many there are (rule C28)."""
    noise = VPLinear()
    solver, target = plugin.solver(noise, a_run(steps=STEPS)), Mixture.two((2,))
    started = begin(problem(noise, solver, target.denoiser(noise), normal()), Start(noised(normal(1)), share=share))
    left = round(share * STEPS)
    assert (started.times.shape[0] - 1, started.run.steps) == (left, left)
    out = march(started)
    assert {c.step for c in calls(started)} == set(range(left)) and {c.steps for c in calls(started)} == {left}
    alone = problem(
        noise, solver, target.denoiser(noise), started.x,
        times=torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)[STEPS - left :],
    )  # fmt: skip
    assert torch.equal(out, march(alone))
    assert len(calls(started)) == len(calls(alone)) == solver.evaluations(left)


def test_too_few_steps_for_the_solver_are_refused() -> None:
    @dataclass(frozen=True)
    class Demanding(DDIMSolver):
        @property
        def facts(self) -> SolverFacts:
            return SolverFacts(order=1, min_steps=4)

    p = problem(Flow(), Demanding(Flow(), 0.0), Gaussian().denoiser(Flow()), normal())
    with pytest.raises(ConfigError, match="leaves 3 of 10 steps, but the solver needs 4"):
        begin(p, Start(noised(normal(1)), share=0.3))


def test_two_starts_are_refused() -> None:
    p = problem(Flow(), DDIMSolver(Flow(), 0.0), Gaussian().denoiser(Flow()), normal())
    once = begin(p, Start(noised(normal(1)), share=0.5))
    with pytest.raises(ConfigError, match=r"begins at t = 0.5 already"):
        truncated(Start(noised(normal(1)), share=0.5))(march)(once)


def test_a_prior_of_another_shape_is_refused() -> None:
    p = problem(Flow(), DDIMSolver(Flow(), 0.0), Gaussian().denoiser(Flow()), normal())
    with pytest.raises(ConfigError, match=r"gave \[3, 5\]; expected \[3, 2\]"):
        begin(p, Start(noised(torch.zeros(1, 5)), share=0.5))


def test_a_start_is_the_sampler_part_of_a_wrap() -> None:
    p = problem(Flow(), DDIMSolver(Flow(), 0.0), Gaussian().denoiser(Flow()), normal())
    start = Start(noised(normal(1)), share=0.5)
    again = replace(p, rng=SampleRng(p.run.seeds))
    assert torch.equal(truncated(start)(march)(p), march(begin(again, start)))


def test_every_group_starts_at_its_own_time() -> None:
    """Per-frame times: the grid's row of the start, and each frame noised as its time says."""
    noise, target = Flow(), Gaussian()
    grid = torch.stack([torch.linspace(1, 0, STEPS + 1).double(), torch.linspace(1, 0, STEPS + 1).double() ** 2], 1)
    x = SampleRng((0, 1)).normal((2, 4)).double()
    x0 = torch.full((1, 2, 4), 5.0, dtype=torch.float64)
    p = problem(noise, DDIMSolver(noise, 0.0), target.denoiser(noise), x, times=grid)
    started = begin(p, Start(noised(x0), share=0.5))
    eps = SampleRng((0, 1)).normal((2, 4)).double()
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)[None, :, None]
    assert torch.allclose(started.x, (1 - t) * x0 + t * eps, rtol=0, atol=1e-12)
    assert march(started).isfinite().all()
    with pytest.raises(ConfigError, match="without groups"):
        begin(p, Start(noised(x0), time=0.3))


# ---- the forward process -----------------------------------------------------------------------------------------


@BY_FAMILY
def test_noise_is_that_which_the_prior_would_have_been(noise: NoiseSchedule) -> None:
    x0, t = normal(), torch.tensor(0.4, dtype=torch.float64)
    got = diffuse(noise, x0, t, SampleRng(range(3)))
    assert torch.allclose(got, noise.alpha(t) * x0 + noise.sigma(t) * normal(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [Masked(), Masked("cosine")], ids=lambda n: n.shape)
def test_tokens_are_masked_with_the_schedules_chance(noise: Masked) -> None:
    t = torch.tensor(0.25 if noise.shape == "linear" else 1 / 3, dtype=torch.float64)
    got = law(lambda rng: diffuse(noise, torch.ones(len(rng.seeds), 1).long(), t, rng, 7), [(4,)])
    kept = 0.75 if noise.shape == "linear" else 0.5  # 1 - cos(pi/3)
    cells = law(lambda rng: diffuse(noise, torch.ones(len(rng.seeds), 1).long(), t, rng, 7), [(100,)])
    assert abs(cells[1,] - kept) <= 0.01
    assert noise.shape != "linear" or got == {(1,): 0.75, (7,): 0.25}


def test_uniform_noise_draws_from_the_whole_vocabulary() -> None:
    t = torch.tensor(0.5, dtype=torch.float64)
    got = law(lambda rng: diffuse(Uniform(), torch.ones(len(rng.seeds), 1).long(), t, rng, 4), [(2,), (4,)])
    assert got == {(0,): 0.125, (1,): 0.625, (2,): 0.125, (3,): 0.125}
    with pytest.raises(ConfigError, match="vocabulary"):
        diffuse(Uniform(), torch.ones(1, 1).long(), t, SampleRng((0,)))


def test_a_partly_masked_text_is_filled_and_the_rest_kept() -> None:
    noise, target = Masked(), Tokens.random(length=40)
    x0 = target.probabilities.argmin(-1)[None] % 4
    p = problem(noise, MDLMSolver(noise, _draw()), target.denoiser(noise), target.prior(SampleRng((0, 1))))
    started = begin(p, Start(noised(x0, 4), share=0.5))
    hidden = started.x == 4
    assert 0 < hidden.sum() < hidden.numel()
    out = march(started)
    assert (out != 4).all() and torch.equal(out[~hidden], x0.expand(2, 40)[~hidden])


def _draw() -> Any:
    from suite.plugins.solvers._tokens import Draw

    return Draw()


# ---- published starts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactFlow(Solver):
    """The probability flow of Gaussian data, without error."""

    noise: NoiseSchedule
    target: Gaussian
    facts = SolverFacts(order=1)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        denoise(x, t)
        return self.target.flow_map(self.noise, x, t, s), state


class Constant(SampleRng):
    """A stream that says one number: an affine sampler shows its mean at 0 and its deviation at 1."""

    def __init__(self, value: float) -> None:
        super().__init__((0,))
        self.value = value

    def normal(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        return torch.full((1, *shape), self.value, dtype=torch.float64)


def law_after(start: Start, noise: NoiseSchedule, target: Gaussian) -> tuple[float, float, int]:
    """Mean and deviation of what an exact solver makes of a start, and how often it evaluated."""
    out, count = [], 0
    for value in (0.0, 1.0):
        p = problem(noise, ExactFlow(noise, target), target.denoiser(noise), at(0), rng=Constant(value))
        started = begin(p, start)
        out.append(float(march(started)))
        count = len(calls(started))
    return out[0], out[1] - out[0], count


def drawn(mean: Callable[[Tensor], Tensor], deviation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A prior that draws x_t itself: N(mean(t), deviation(t)^2)."""
    return lambda noise, t, rng: mean(t) + deviation(t) * rng.normal((1,))


TARGET = Gaussian(0.7, 0.25)
EVERY_T0 = pytest.mark.parametrize("share", [0.1, 0.5, 0.9])


@BY_FAMILY
@EVERY_T0
def test_es_ddpm_a_right_generator_gives_the_right_law(noise: NoiseSchedule, share: float) -> None:
    """Guesses at x0 that are noised (2205.12524); as many evaluations as steps are left."""
    generator = noised(lambda rng: 0.7 + 0.5 * rng.normal((1,)))

    class Two(Constant):
        """x0's number and the noise's are independent: the generator's is probed, then the noise's."""

        def __init__(self, values: tuple[float, float]) -> None:
            super().__init__(0.0)
            self.values = list(values)

        def normal(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
            return torch.full((1, *shape), self.values.pop(0), dtype=torch.float64)

    out = []
    for values in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        p = problem(noise, ExactFlow(noise, TARGET), TARGET.denoiser(noise), at(0), rng=Two(values))
        started = begin(p, Start(generator, share=share))
        out.append(float(march(started)))
        assert len(calls(started)) == round(share * STEPS)
    exact = TARGET.marginal(noise, 0.0)
    got = (out[0], (out[1] - out[0]) ** 2 + (out[2] - out[0]) ** 2)
    assert got == pytest.approx([float(v) for v in exact], abs=1e-9)


@BY_FAMILY
@EVERY_T0
def test_tdpm_and_leapfrog_a_right_model_of_x_t_gives_the_right_law(noise: NoiseSchedule, share: float) -> None:
    """Leapfrog's initializer says mean, spread and normalised samples (Mao 2023); at share 1 it is not asked."""
    prior = drawn(lambda t: TARGET.marginal(noise, t)[0], lambda t: TARGET.marginal(noise, t)[1].sqrt())
    mean, deviation, count = law_after(Start(prior, share=share), noise, TARGET)
    exact = TARGET.marginal(noise, 0.0)
    assert (mean, deviation**2) == pytest.approx([float(v) for v in exact], abs=1e-9)
    assert count == round(share * STEPS)
    p = problem(noise, ExactFlow(noise, TARGET), TARGET.denoiser(noise), at(0.3))
    assert begin(p, Start(prior, share=1.0)) is p


@EVERY_T0
def test_a_wrong_prior_gives_a_wrong_law(share: float) -> None:
    """That the tests above can fail: half the deviation stays half of it."""
    noise = VPLinear()
    prior = drawn(lambda t: TARGET.marginal(noise, t)[0], lambda t: TARGET.marginal(noise, t)[1].sqrt() / 2)
    assert law_after(Start(prior, share=share), noise, TARGET)[1] == pytest.approx(0.25)


def test_dinof_an_invertible_flow_is_a_prior() -> None:
    """x = exp(a(z2)) z1 + b(z2) on pairs (2309.01274): inverse to 1e-12, and the density it claims is the exact one."""
    noise, time = VPLinear(), 0.4
    mean, variance = TARGET.marginal(noise, time)

    def forward(z: Tensor) -> Tensor:
        second = mean + variance.sqrt() * z[:, 1:]
        scale, shift = torch.tanh(second), second.square()
        first = z[:, :1] * scale.exp() + shift
        return torch.cat([(first - shift) / scale.exp() * variance.sqrt() + mean, second], 1)

    def inverse(x: Tensor) -> Tensor:
        return (x - mean) / variance.sqrt()

    z = SampleRng(range(50)).normal((2,)).double()
    assert (inverse(forward(z)) - z).abs().max() < 1e-12
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: forward(row[None])[0]))(z)
    claimed = -0.5 * z.square().sum(1) - torch.linalg.slogdet(jacobian).logabsdet
    exact = -0.5 * ((forward(z) - mean) ** 2 / variance + variance.log()).sum(1)
    assert torch.allclose(claimed, exact, rtol=0, atol=1e-12)
    start = Start(lambda noise, t, rng: forward(rng.normal((2,)).double()), time=time)
    p = problem(noise, ExactFlow(noise, TARGET), TARGET.denoiser(noise), normal(50))
    started = begin(p, start)
    out = march(started)
    assert torch.allclose(out, TARGET.flow_map(noise, forward(z), time, 0.0), rtol=0, atol=1e-9)
    assert len(calls(started)) == 4  # 0.4, 0.3, 0.2, 0.1


@BY_FAMILY
@pytest.mark.parametrize("level", [0.2, 0.7])
def test_ddm2_noisy_data_are_a_state_of_the_chain(noise: NoiseSchedule, level: float) -> None:
    """y = x0 + level eps (2302.03018): the start is where sigma / alpha is that level, and scaled y has p_t's law."""
    start = observed(noise, at(1.0), level)
    assert start.time is not None
    alpha, sigma = noise.alpha(start.time), noise.sigma(start.time)
    assert float(sigma / alpha) == pytest.approx(level, rel=1e-9)
    mean, variance = TARGET.marginal(noise, start.time)
    assert float(alpha) * 0.7 == pytest.approx(float(mean))
    assert float(alpha) ** 2 * (0.25 + level**2) == pytest.approx(float(variance))
    p = problem(noise, ExactFlow(noise, TARGET), TARGET.denoiser(noise), at(0))
    started = begin(p, start)
    assert float(started.x) == pytest.approx(float(alpha))
    assert march(started).isfinite().all() and len(calls(started)) == int((p.times < start.time - 1e-9).sum())


@pytest.mark.parametrize("noise", [VPLinear(), Cosine(), Flow()], ids=lambda n: n.family)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ccdf_contracts_linearly(noise: NoiseSchedule, eta: float) -> None:
    """Two estimates with one noise (2112.05146): their distance shrinks by one factor, and the more the later t0 is."""
    solver, denoise = DDIMSolver(noise, eta), TARGET.denoiser(noise)
    grid = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    factors = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        results = []
        for estimate in (-1.0, 0.5, 2.0):
            p = problem(noise, solver, denoise, at(0, 3))
            results.append(march(begin(p, Start(noised(at(estimate)), share=share))))
        low, high = (b - a for a, b in itertools.pairwise(results))
        assert torch.allclose(low, high, rtol=0, atol=1e-6)
        times = grid[STEPS - round(share * STEPS) :]
        exact = float(noise.alpha(times[0]))
        for t, s in itertools.pairwise(times):
            exact *= float(affine_step(solver, denoise, t, s)[0])
        assert float(low.mean()) / 1.5 == pytest.approx(exact, abs=1e-6)
        factors.append(exact)
    assert all(1 > a > b > 0 for a, b in itertools.pairwise(factors))


def kl(mean: Tensor, variance: Tensor, other: tuple[Tensor, Tensor]) -> float:
    """KL(N(mean, variance) || N(other))."""
    ratio = variance / other[1]
    return float(0.5 * (ratio - 1 - ratio.log() + (mean - other[0]) ** 2 / other[1]))


@pytest.mark.parametrize("noise", [VPLinear(), Cosine()], ids=lambda n: n.family)
def test_noise_heals_a_wrong_start_and_the_flow_does_not(noise: NoiseSchedule) -> None:
    """Nie 2023 (2311.01410): from N(0.2, 1.5 v) at t0, KL to p_t stays under the flow and falls under the SDE."""
    times = noise.time_at(torch.linspace(-1, 6, 4001, dtype=torch.float64))
    denoise = TARGET.denoiser(noise)
    mean, variance = torch.tensor(0.2).double(), 1.5 * TARGET.marginal(noise, times[0])[1]
    before = kl(mean, variance, TARGET.marginal(noise, times[0]))
    moved = [float(TARGET.flow_map(noise, mean + k * variance.sqrt(), times[0], times[-1])) for k in (0, 1)]
    flow = kl(torch.tensor(moved[0]), torch.tensor(moved[1] - moved[0]) ** 2, TARGET.marginal(noise, times[-1]))
    assert flow == pytest.approx(before, rel=1e-5)
    seen = [before]
    for part in times.unfold(0, 1001, 1000):
        mean, variance = moments(DDIMSolver(noise, 1.0), part, denoise, mean, variance)
        seen.append(kl(mean, variance, TARGET.marginal(noise, part[-1])))
    assert all(a > b for a, b in itertools.pairwise(seen)) and seen[-1] < 0.2 * before


# ---- DMCMC -------------------------------------------------------------------------------------------------------

LEVELS = (0.1, 0.2, 0.3, 0.5)
PEAKS, WIDTHS, SHARES = (torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 0.8), (0.05, 0.2), (0.35, 0.65)))


def density(noise: NoiseSchedule, x: Tensor, t: float) -> Tensor:
    alpha, variance = noise.alpha(t), noise.alpha(t) ** 2 * WIDTHS + noise.sigma(t) ** 2
    return (
        SHARES * torch.exp(-0.5 * (x[..., None] - alpha * PEAKS) ** 2 / variance) / (2 * math.pi * variance).sqrt()
    ).sum(-1)


def chances(noise: NoiseSchedule, x: Tensor) -> Tensor:
    """P(level given x), [..., levels], for levels that are equally likely beforehand."""
    each = torch.stack([density(noise, x, t) for t in LEVELS], -1)
    return each / each.sum(-1, keepdim=True)


def posterior(noise: NoiseSchedule, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and variances of x0 given x_t, by component."""
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    variance = alpha**2 * WIDTHS + sigma**2
    away = x[..., None] - alpha * PEAKS
    weights = (SHARES.log() - 0.5 * (away**2 / variance + variance.log())).softmax(-1)
    return weights, PEAKS + alpha * WIDTHS / variance * away, WIDTHS * sigma**2 / variance


def test_dmcmc_the_chain_keeps_the_joint_law() -> None:
    """Denoise and noise again at one level leaves p_t as it is, by quadrature; drawing the level is Gibbs' own step."""
    noise, x = VPLinear(), torch.linspace(-7, 7, 1401, dtype=torch.float64)
    for t in LEVELS:
        weights, means, variances = posterior(noise, x, t)
        centre, spread = noise.alpha(t) * means, noise.alpha(t) ** 2 * variances + noise.sigma(t) ** 2
        kernel = (
            weights[:, None]
            * torch.exp(-0.5 * (x[None, :, None] - centre[:, None]) ** 2 / spread)
            / (2 * math.pi * spread).sqrt()
        ).sum(-1)  # [from, to]
        after = (density(noise, x, t)[:, None] * kernel).sum(0) * (x[1] - x[0])
        assert torch.allclose(after, density(noise, x, t), rtol=0, atol=1e-9)


def test_dmcmc_chains_start_near_the_data_and_save_evaluations() -> None:
    """2209.14593: 4000 chains from the joint law, one sweep; levels stay equally likely, within 4 standard errors."""
    noise, rows = VPLinear(), 4000
    rng = SampleRng(range(rows))
    pick = (rng.uniform((1,))[:, 0] * len(LEVELS)).long()
    component = (rng.uniform((1,))[:, 0] > SHARES[0]).long()
    x0 = PEAKS[component] + WIDTHS[component].sqrt() * rng.normal((1,))[:, 0]
    times = torch.tensor(LEVELS, dtype=torch.float64)
    x = diffuse(noise, x0, times[pick], rng)
    level = (rng.uniform((1,)) > chances(noise, x).cumsum(-1)).sum(-1).clamp(max=len(LEVELS) - 1)
    out, spent = torch.zeros(rows).double(), 0
    for index, t in enumerate(LEVELS):
        mine = level == index
        assert abs(float(mine.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / rows)
        weights, means, variances = posterior(noise, x[mine], t)
        streams = SampleRng([10_000 + k for k in mine.nonzero()[:, 0].tolist()])
        which = (streams.uniform((1,)) > weights[:, :1]).long()
        clean = means.gather(-1, which)[:, 0] + variances[which[:, 0]].sqrt() * streams.normal((1,))[:, 0]
        state = diffuse(noise, clean, torch.tensor(t).double(), streams)[:, None]
        target = Mixture(SHARES, PEAKS[:, None], WIDTHS)
        p = problem(noise, DDIMSolver(noise, 1.0), target.denoiser(noise), state, seeds=streams.seeds)
        started = begin(p, Start(lambda noise, t, rng, state=state: state, time=t))
        out[mine] = march(started)[:, 0]
        spent += len(calls(started)) * int(mine.sum())
    exact = float((SHARES * PEAKS).sum())
    second = float((SHARES * (WIDTHS + PEAKS**2)).sum())
    assert abs(float(out.mean()) - exact) < 4 * math.sqrt((second - exact**2) / rows)
    assert spent / rows == pytest.approx(10 * sum(LEVELS) / len(LEVELS), rel=0.1) and spent / rows < STEPS / 2
