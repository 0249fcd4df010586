"""Score distillation on a Gaussian teacher, where gradient, limit and spread are known exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond
from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.schedule import DISTILLATION_RANGE, Schedule
from suite.diffusion.solver import Solver, SolverFacts, transfer
from suite.engine.score_distillation import (
    Distillation,
    Representation,
    Score,
    Views,
    distill,
    epsilon,
    gradient,
    noised,
    time_for,
    weight,
)
from suite.engine.score_distillation_options import OPTIONS, iterations
from suite.errors import ConfigError
from suite.request import resolve
from suite.run import Run
from suite.testing import Gaussian

MEAN, VARIANCE = 0.7, 0.25
TEACHER = Gaussian(MEAN, VARIANCE)
NOISES = [VPLinear(), VE(), Flow(), Cosine()]


@dataclass(frozen=True)
class Euler(Solver):
    """DDIM without a plugin."""

    noise: NoiseSchedule
    facts = SolverFacts(order=1)

    def step(self, denoise: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        return transfer(self.noise, x, denoise(x, t), t, s), state


class Linear(Schedule):
    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Teacher:
    noise: NoiseSchedule
    calls: list[Call] = field(default_factory=list)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        self.calls.append(call)
        return TEACHER.denoiser(self.noise)(x, t)


class Particles(Representation):
    """Numbers that are their own views."""

    def __init__(self, count: int = 256, rate: float = 0.05) -> None:
        start = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
        self.x = (2 * start - 1).requires_grad_(True)
        self.rate = rate
        self.seen: list[float] = []

    def views(self, progress: float, rng: SampleRng) -> Views:
        self.seen.append(progress)
        return Views(self.x, {"cond": {}})

    def optimiser(self) -> torch.optim.Optimizer:
        self.sgd = torch.optim.SGD([self.x], lr=self.rate * len(self.x))
        return self.sgd

    def updated(self, progress: float) -> None:
        self.sgd.param_groups[0]["lr"] = self.rate * len(self.x) * (1 - progress)  # so that its noise dies out

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x.detach()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.x.data.copy_(state["x"])


@dataclass
class Fitted:
    """The exact denoiser of the Gaussian with the particles' own mean and variance."""

    noise: NoiseSchedule
    particles: Particles

    def fit(self, x: Tensor, cond: Mapping[str, Cond], rng: SampleRng) -> float:
        return 0.0

    def denoise(self, x: Tensor, t: Tensor, cond: Mapping[str, Cond]) -> Tensor:
        now = self.particles.x.detach()
        return Gaussian(float(now.mean()), float(now.var())).denoiser(self.noise)(x, t)


@dataclass
class TheNoise:
    """A score that knows which noise was added: its estimate is the views themselves."""

    particles: Particles

    def fit(self, x: Tensor, cond: Mapping[str, Cond], rng: SampleRng) -> float:
        return 0.0

    def denoise(self, x: Tensor, t: Tensor, cond: Mapping[str, Cond]) -> Tensor:
        return self.particles.x.detach().clone()


def problem(particles: Particles, noise: NoiseSchedule | None = None, **changes: Any) -> Distillation:
    noise = noise or Flow()
    base = Distillation(particles, Teacher(noise), Linear(), Euler(noise), noise, Run("m", "n"), iterations=400)
    return replace(base, **changes)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("log_snr", [-3.0, 0.0, 3.0])
def test_the_residual_is_that_of_epsilon(noise: NoiseSchedule, log_snr: float) -> None:
    t = noise.time_at(torch.tensor(log_snr, dtype=torch.float64))
    rng = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(16, 1, dtype=torch.float64, generator=rng) for _ in range(2))
    x_t = noised(noise, x0, t, eps)
    target = TEACHER.denoiser(noise)(x_t, t)
    expected = weight(noise, t) * (epsilon(noise, x_t, target, t) - eps)
    torch.testing.assert_close(gradient(noise, t, x0, target), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_expected_gradient_of_sds(noise: NoiseSchedule) -> None:
    """w alpha sigma / (alpha^2 s^2 + sigma^2) (x - mean), exactly, over an antithetic pair of noises."""
    t = noise.time_at(torch.tensor(0.4, dtype=torch.float64))
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    x0 = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    eps = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    both = [gradient(noise, t, x0, TEACHER.denoiser(noise)(noised(noise, x0, t, e), t)) for e in (eps, -eps)]
    expected = weight(noise, t) * alpha * sigma / (alpha**2 * VARIANCE + sigma**2) * (x0 - MEAN)
    torch.testing.assert_close(torch.stack(both).mean(0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("noise", "rate"), [(Flow(), 0.5), (VPLinear(), 1.2)], ids=["flow", "vp-linear"])
def test_sds_seeks_the_mode_and_vsd_the_distribution(noise: NoiseSchedule, rate: float) -> None:
    """SDS loses all variance; VSD recovers the teacher's 0.25."""
    alone, many = Particles(rate=rate), Particles(rate=rate)
    distill(problem(alone, noise, iterations=500), [])
    score = Fitted(noise, many)
    distill(problem(many, noise, method="vsd", score=score, iterations=500), [])
    assert float(alone.x.detach().mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(alone.x.detach().var()) < 0.01
    assert float(many.x.detach().mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(many.x.detach().var()) == pytest.approx(VARIANCE, rel=0.05)


def test_vsd_that_knows_the_noise_is_sds() -> None:
    one, two = Particles(), Particles()
    distill(problem(one, iterations=20), [])
    score: Score = TheNoise(two)
    distill(problem(two, iterations=20, method="vsd", score=score), [])
    assert torch.equal(one.x, two.x)


@pytest.mark.parametrize("noise", [Flow(), VPLinear()], ids=lambda n: n.family)
def test_ism_rests_on_the_mean_and_pulls_towards_it(noise: NoiseSchedule) -> None:
    still = Particles(4)
    still.x.data.fill_(MEAN)
    distill(problem(still, noise, method="ism", iterations=5, target_steps=3), [])
    torch.testing.assert_close(still.x.detach(), torch.full((4, 1), MEAN), atol=1e-5, rtol=0)
    off = Particles(4, rate=1.0)
    off.x.data.copy_(torch.tensor([[-1.0], [0.0], [1.5], [2.0]]))
    before = (off.x.detach() - MEAN).abs()
    distill(problem(off, noise, method="ism", iterations=100, target_steps=3), [])
    assert ((off.x.detach() - MEAN).abs() < 0.5 * before).all()


def test_more_solver_steps_change_the_target_and_are_calls() -> None:
    noise = Flow()
    for steps in (1, 4):
        teacher = Teacher(noise)
        distill(problem(Particles(4), iterations=3, target_steps=steps, denoiser=teacher), [])
        assert len(teacher.calls) == 3 * steps
    assert [c.step for c in teacher.calls[:4]] == [0, 1, 2, 3]


def test_same_seed_same_run_and_a_later_start_draws_the_same() -> None:
    def run(first: int = 0, seed: int = 0) -> list[dict[str, float]]:
        log: list[dict[str, float]] = []
        distill(problem(Particles(4), iterations=10, first=first, seed=seed), log)
        return log

    assert run() == run()
    assert [r["t"] for r in run(first=6)] == [r["t"] for r in run()][6:]
    assert run(seed=1) != run()


def test_progress_is_told_and_what_was_done_survives_a_stop() -> None:
    log: list[dict[str, float]] = []

    def stop(index: int) -> None:
        if index == 3:
            raise KeyboardInterrupt

    particles = Particles(4)
    with pytest.raises(KeyboardInterrupt):
        distill(problem(particles, iterations=8, on_step=stop), log)
    assert [r["iteration"] for r in log] == [0, 1, 2, 3]
    assert particles.seen == [0, 1 / 8, 2 / 8, 3 / 8]


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_times_go_down_the_schedule(noise: NoiseSchedule) -> None:
    low, high = DISTILLATION_RANGE
    rng = torch.Generator().manual_seed(0)
    means = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        times = Linear().distillation_times(noise, 512, progress, rng)
        assert times.dtype == torch.float64 and times.min() >= low and times.max() <= high
        means.append(float(times.mean()))
    assert means == sorted(means, reverse=True) and means[1] == pytest.approx(0.525, abs=0.02)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="expected one of sds, vsd, ism"):
        distill(problem(Particles(4), method="svd"), [])
    with pytest.raises(ConfigError, match="vsd needs a network"):
        distill(problem(Particles(4), method="vsd"), [])

    class Multistep(Euler):
        facts = SolverFacts(order=2, multistep=True)

    with pytest.raises(ConfigError, match="--solver ddim"):
        distill(problem(Particles(4), method="ism", solver=Multistep(Flow())), [])

    class Zero(Linear):
        def distillation_times(self, noise: Any, batch: int, progress: float, rng: torch.Generator) -> Tensor:
            return torch.zeros(batch, dtype=torch.float64)

    with pytest.raises(ConfigError, match="expected above 0"):
        time_for(Zero(), Flow(), 0.0, SampleRng([0]))


def test_iterations_follow_the_recipe_unless_asked() -> None:
    asked = resolve(OPTIONS, {"iterations": 7}, "m")
    assert iterations(8, resolve(OPTIONS, None, "m")) == 8 * iterations(1, {})
    assert iterations(8, asked) == 7
