"""Score distillation: a teacher's gradient on pictures of something that is optimised, not sampled.

A `Representation` (a radiance field, a mesh, a set of particles) renders views; the engine noises them, asks the
denoiser where they should have come from, and hands the difference back as the views' gradient. The network is
never differentiated. All three gradients are one expression with two arguments,

    g = w(t) (alpha/sigma) (own - target) = w(t) (eps_target - eps_own),      w(t) = sigma^2 / (alpha^2 + sigma^2),

where `target` is what the teacher makes of x_t = alpha views + sigma eps:

    SDS (Poole 2022, 2209.14988, eq. 3)    own = the views themselves: eps_own is the noise that was added
    VSD (Wang 2023, 2305.16213, eq. 9)     own = what a network that knows the present views makes of x_t
    ISM (Liang 2023, 2311.11284, eq. 14)   x_t by inversion from x_s instead of fresh noise; eps_own = eps(x_s, s)

The residual of SDS is exactly eps_hat - eps = (alpha/sigma)(x0 - x0_hat), so it needs nothing but a Denoiser and a
NoiseSchedule, and every wrap of the denoiser applies. w is DreamFusion's sigma^2 for variance-preserving noise,
and stays bounded for every other family.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.rng import SampleRng, repeatable
from suite.diffusion.sampler import Problem, Sampler, march
from suite.diffusion.solver import Denoise, expand
from suite.engine.score_distillation_options import METHODS
from suite.errors import ConfigError
from suite.observe.finite import check_state

if TYPE_CHECKING:
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.diffusion.schedule import Schedule
    from suite.diffusion.solver import Solver
    from suite.run import Run


@dataclass(frozen=True)
class Views:
    """What a representation shows in one iteration.

    Attributes:
        x: [V, ...] float32 in the data's range, differentiable.
        cond: conditioning of each branch, V rows.
        penalty: a scalar to be added to the loss, differentiable: what the representation wants for itself.
        facts: numbers for the log.
    """

    x: Tensor
    cond: Mapping[str, Cond]
    penalty: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class Representation(ABC):
    """What is optimised. One a sample, made from its prompt and seed."""

    @abstractmethod
    def views(self, progress: float, rng: SampleRng) -> Views:
        """Render views from where `rng` says; `progress` runs from 0 to 1."""

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """Over the parameters; called once."""

    def updated(self, progress: float) -> None:
        """Called after each step of the optimiser: refine a grid, drop what is empty, change rates."""
        del progress

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, as tensors."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state. ConfigError if it does not fit."""


class Score(Protocol):
    """A model of the present views, for VSD."""

    def fit(self, x: Tensor, cond: Mapping[str, Cond], rng: SampleRng) -> float:
        """Learn from views [V, ...]; returns the loss."""
        ...

    def denoise(self, x: Tensor, t: Tensor, cond: Mapping[str, Cond]) -> Tensor:
        """x0 [V, ...] given x at time t."""
        ...


@dataclass(frozen=True)
class Distillation:
    """Everything that the loop needs, as values.

    Attributes:
        representation: changed in place.
        denoiser: guided; its conditioning maps branches to conditionings.
        schedule, solver, noise, run: as the hooks gave them.
        seed: every iteration draws from a stream of its own, made from this and its index.
        sampler: the loop over the solver's steps, with the wraps' samplers around it.
        method: `sds`, `vsd` or `ism`.
        iterations: steps of the optimiser.
        first: iterations that a checkpoint has already done.
        target_steps: solver steps from x_t (or up to it, for `ism`) to what the teacher makes of it.
        score: for `vsd`.
        on_step: called after each iteration with its index.
        keep: called after each iteration with its index, to save a checkpoint when it is time.
    """

    representation: Representation
    denoiser: Denoiser
    schedule: Schedule
    solver: Solver
    noise: NoiseSchedule
    run: Run
    seed: int = 0
    sampler: Sampler = march
    method: str = "sds"
    iterations: int = 100
    first: int = 0
    target_steps: int = 1
    score: Score | None = None
    on_step: Callable[[int], object] = field(default=lambda step: None)
    keep: Callable[[int], None] = field(default=lambda step: None)


@dataclass(frozen=True)
class Distilled:
    """What a run left of one sample.

    Attributes:
        representation: as it is after the last iteration.
        log: one record an iteration of this process.
        complete: all iterations were done.
    """

    representation: Representation
    log: list[dict[str, float]] = field(repr=False)
    complete: bool = True


def weight(noise: NoiseSchedule, t: Tensor) -> Tensor:
    """w(t) = sigma^2 / (alpha^2 + sigma^2), float64."""
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    return sigma**2 / (alpha**2 + sigma**2)


def gradient(noise: NoiseSchedule, t: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """w(t) (alpha/sigma) (own - target), in the views' space. t float64, scalar or [V]; sigma(t) > 0."""
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    # Not weight() * alpha / sigma: this form has no division by sigma.
    return expand(alpha * sigma / (alpha**2 + sigma**2), own) * (own - target)


def noised(noise: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps."""
    return expand(noise.alpha(t), x0) * x0 + expand(noise.sigma(t), x0) * eps


def epsilon(noise: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The noise that x at time t holds if it came from x0. sigma(t) > 0."""
    return (x - expand(noise.alpha(t), x) * x0) / expand(noise.sigma(t), x)


def invert(
    noise: NoiseSchedule, solver: Solver, denoise: Denoise, x0: Tensor, times: Tensor, run: Run, rng: SampleRng
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry clean x0 up the increasing `times` with the solver run backwards: (x at times[-2], its x0, x at times[-1]).

    The start at times[0] is alpha x0 without noise, as there is none to invert yet (Liang 2023, section 4.1).
    """
    x, state, known = expand(noise.alpha(times[0]), x0) * x0, solver.init(run), x0
    below, estimate = x, x0

    def remembered(x: Tensor, t: Tensor) -> Tensor:
        nonlocal known
        known = denoise(x, t)
        return known

    for t, s in itertools.pairwise(times):
        below = x
        x, state = solver.step(remembered, x, t, s, state, rng)
        estimate = known
    return below, estimate, x


def distill(problem: Distillation, log: list[dict[str, float]]) -> None:
    """Optimise the representation; `log` gets one record an iteration, so that what was done survives a Ctrl-C.

    Raises:
        ConfigError: a method that is not there, or that lacks what it needs.
        NumericsError: a gradient, or what was made of it, is not finite.
    """
    p = problem
    if p.method not in METHODS:
        raise ConfigError(f"distill = {p.method!r}: expected one of {', '.join(METHODS)}")
    if p.method == "vsd" and p.score is None:
        raise ConfigError("vsd needs a network of the present views, and got none")
    if p.method == "ism" and p.solver.facts.multistep:
        raise ConfigError(
            "ism runs the solver backwards, and a multistep solver's history does not: take --solver ddim"
        )
    optimiser = p.representation.optimiser()
    for index in range(p.first, p.iterations):
        progress = index / p.iterations
        rng = stream(p.seed, index)
        views = p.representation.views(progress, rng)
        t = time_for(p.schedule, p.noise, progress, rng)
        x0 = views.x.detach()
        grad, facts = _direction(p, x0, views.cond, t, rng)
        loss = (views.x * grad).sum() / len(x0)
        if views.penalty is not None:
            loss = loss + views.penalty
        optimiser.zero_grad(set_to_none=True)
        with repeatable(x0.device):
            loss.backward()
        optimiser.step()
        p.representation.updated((index + 1) / p.iterations)
        penalty = float(views.penalty.detach()) if views.penalty is not None else 0.0
        residual = float(grad.square().mean().sqrt())
        check_state({"the views' gradient": residual, "the penalty": penalty}, index, p.run.dtype)
        log.append(
            {"iteration": index, "t": float(t), "residual": residual, "penalty": penalty, **facts, **views.facts}
        )
        p.keep(index)
        p.on_step(index)
    check_state(p.representation.state(), p.iterations - 1, p.run.dtype)


def stream(seed: int, index: int) -> SampleRng:
    """The random stream of one iteration: a resumed run draws what it would have drawn."""
    mixed = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    return SampleRng([int.from_bytes(mixed, "big")])


def time_for(schedule: Schedule, noise: NoiseSchedule, progress: float, rng: SampleRng) -> Tensor:
    """The time of one iteration, a float64 scalar, as the schedule draws it for this progress."""
    generator = torch.Generator().manual_seed(int(float(rng.uniform((1,))) * 2**24))
    t = schedule.distillation_times(noise, 1, progress, generator)[0]
    if not 0 < t <= 1:
        raise ConfigError(f"the schedule drew the distillation time {float(t)}; expected above 0, at most 1")
    return t


def _direction(
    p: Distillation, x0: Tensor, cond: Mapping[str, Cond], t: Tensor, rng: SampleRng
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of the views [V, ...], without the Jacobian of any network."""
    if p.method == "ism":
        return _interval(p, x0, cond, t, rng), {}
    x_t = noised(p.noise, x0, t, rng.normal(x0.shape)[0].to(x0))
    times = torch.linspace(1, 0, p.target_steps + 1, dtype=torch.float64) * t
    with torch.no_grad():
        target = p.sampler(Problem(x_t, times, p.denoiser, cond, p.solver, p.noise, _each(rng, x0), p.run))
        if p.method == "sds" or p.score is None:
            return gradient(p.noise, t, x0, target), {}
        found = gradient(p.noise, t, p.score.denoise(x_t, t, cond), target)
    return found, {"score_loss": p.score.fit(x0, cond, rng)}


def _each(rng: SampleRng, x0: Tensor) -> SampleRng:
    """A stream a view, for solvers that draw noise."""
    seeds = (rng.uniform((len(x0),))[0].double() * 2**24).long().tolist()
    return SampleRng(seeds)


def _interval(p: Distillation, x0: Tensor, cond: Mapping[str, Cond], t: Tensor, rng: SampleRng) -> Tensor:
    """w(t) (eps(x_t, t) - eps(x_s, s)), x_s and x_t on one inverted path of `target_steps` + 1 intervals."""
    count = p.target_steps + 1
    times = torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:] * t
    evaluation, last = 0, float(t)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluation
        call = Call(evaluation, count, float(t), last, 0, "cond", p.run.run_id)
        evaluation += 1
        return p.denoiser.denoise(x, t, cond, call)

    with torch.no_grad():
        x_s, known, x_t = invert(p.noise, p.solver, denoise, x0, times, p.run, _each(rng, x0))
        before = epsilon(p.noise, x_s, known, times[-2])
        after = epsilon(p.noise, x_t, denoise(x_t, t), t)
        return expand(weight(p.noise, t), x0) * (after - before)
