"""`Sampler`: the loop from the prior to x0, a plain function that wraps may replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Denoiser, chosen
from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver
from suite.run import Run


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step; what a callback of the engine is shown.

    Attributes:
        step: its index; `steps` of them are run in all.
        t: the time that was reached; None in distillation, whose times are drawn.
        x: the state there, [B, ...]; None in distillation. Where a cache runs a batch in parts, the rows of the part.
        x0: the last guided estimate of x0, of which the step was made; None if nothing was evaluated.
    """

    step: int
    steps: int
    t: float | None = None
    x: Tensor | None = None
    x0: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that the loop needs, as values.

    Attributes:
        x: state at times[0], float32 [B, ...] (or tokens).
        times: [steps + 1] or [steps + 1, groups], decreasing.
        denoiser: guided; its conditioning maps branches to conditionings.
        cond: that conditioning.
        solver, noise, rng, run: as the hooks gave them.
        on_step: called after each step.
        share: of the batch's rows that this problem has, where a batch is run in parts; see `some`.
    """

    x: Tensor
    times: Tensor
    denoiser: Denoiser
    cond: Any
    solver: Solver
    noise: NoiseSchedule
    rng: SampleRng
    run: Run
    on_step: Callable[[Progress], None] = field(default=lambda progress: None)
    share: float = 1.0


Sampler = Callable[[Problem], Tensor]


def some(problem: Problem, rows: Sequence[int]) -> Problem:
    """The same problem for some rows of its batch, as a run of its own with their conditioning and streams.

    It has an id of its own, because what is kept between the evaluations of a run belongs to its rows.
    """
    index = torch.tensor(list(rows), device=problem.x.device)
    run, count = problem.run, problem.x.shape[0]
    seeds = tuple(problem.rng.seeds[row] for row in rows)
    return replace(
        problem,
        x=problem.x[index],
        cond={branch: chosen(cond, index) for branch, cond in problem.cond.items()},
        rng=problem.rng.of(rows),
        run=replace(run, batch=len(seeds), seeds=seeds, run_id=f"{run.run_id}/{','.join(map(str, rows))}"),
        share=problem.share * len(seeds) / count,
    )


def time_at(problem: Problem, index: int) -> Tensor:
    """The grid's time: a scalar, or [B, groups] where groups of one sample have times of their own."""
    time = problem.times[index]
    return time if time.ndim == 0 else time.expand(problem.x.shape[0], -1)


def _latest(time: Tensor) -> float:
    return float(time if time.ndim == 0 else time.max())


def bind(problem: Problem, step: int, s: Tensor) -> Denoise:
    """The denoiser as the solver sees it in one step: it counts evaluations and makes each `Call`."""
    evaluation = 0
    end = _latest(s)
    steps = problem.times.shape[0] - 1

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluation
        call = Call(step, steps, _latest(t), end, evaluation, "cond", problem.run.run_id, problem.share)
        evaluation += 1
        return problem.denoiser.denoise(x, t, problem.cond, call)

    return denoise


def march(problem: Problem) -> Tensor:
    """Step through the times; the plain sampler. Without a step x is what it was."""
    if problem.times.shape[0] == 1:
        return problem.x
    x, state = problem.x, problem.solver.begin(problem.run, problem.times)
    steps = problem.times.shape[0] - 1
    if isinstance(problem.solver, AdaptiveSolver):
        first, last = problem.times[0], problem.times[-1]
        budget = problem.solver.evaluations(steps)
        out = problem.solver.solve(bind(problem, 0, last), problem.x, first, last, budget, problem.rng)
        problem.on_step(Progress(steps - 1, steps, _latest(last), out))
        return out
    for step in range(steps):
        t, s = time_at(problem, step), time_at(problem, step + 1)
        x, state = problem.solver.step(bind(problem, step, s), x, t, s, state, problem.rng)
        problem.on_step(Progress(step, steps, _latest(s), x))
    return x
