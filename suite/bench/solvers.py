"""Errors of solvers on grids against many evaluations from the same noise, at equal numbers of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from suite.bench.record import Record
from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.solver import Solver
from suite.engine.engine import Engine
from suite.errors import ConfigError, SuiteError
from suite.files.inputs import check
from suite.files.output import write
from suite.fitting.grid_fit import ModelProblem, relative_error
from suite.host.plan import Plan
from suite.observe.attribution import attributed
from suite.run import Run

EDGE = 1e-6
"""How far outside of an edge of guidance the second stop lies."""

FLOOR = 0.01
"""sigma / alpha of the last time of the reference before 0."""

TOP = 0.999
"""Its first time below 1: log-SNR is -inf at 1 in some families."""


@dataclass
class SolverBench:
    """The measurements of one request.

    Attributes:
        engine: the loaded model.
        plan: (solver, schedule, steps) -> plan; ConfigError if they do not go together.
        prompts, seeds: one sample each.
        batch: samples at once.
        record: what is known; every new row is written at once.
        metric: also the modality's own quality numbers.
        on_call: called with (title, evaluations done, in all).
    """

    engine: Engine
    plan: Callable[[str, str, int], Plan]
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int
    record: Record
    metric: bool = False
    on_call: Callable[[str, int, int], None] = lambda title, done, total: None
    exact: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run: Run = ModelProblem(self.engine, self.prompts, self.seeds, self.batch).run

    def problem(self, plan: Plan) -> ModelProblem:
        """The model under a plan, on these samples."""
        return ModelProblem(
            self.engine.under(plan),
            self.prompts,
            self.seeds,
            self.batch,
            on_call=self.on_call,
            clean=self.exact or None,
        )

    def refer(self, solver: str, evaluations: int) -> None:
        """Make the reference, or read it if it was made before: see `reference_grid`.

        The same with half the evaluations says how far it is from its own limit.
        """
        file = self.record.beside("-reference.safetensors")
        if self.record.reference and file.exists():
            check(file, "reference")
            self.exact = list(load_file(file)["x0"].split(self.batch))
            return
        problem = self.problem(self.plan(solver, "uniform", evaluations))
        steps = steps_within(problem.solver, evaluations)
        interval = self.run.guidance_interval if self.run.guidance != 1 else (0.0, 1.0)
        half, exact = (
            problem.sample(f"reference, {n} steps", reference_grid(problem.noise, n, interval))
            for n in (steps // 2, steps)
        )
        self.exact = exact
        write(file, lambda temporary: save_file({"x0": torch.cat(exact)}, temporary))
        self.record.reference = {
            "solver": solver,
            "schedule": f"half even in t, half in log-SNR, to sigma / alpha = {FLOOR:g}",
            "steps": steps,
            "evaluations": evaluations,
            "half_differs": relative_error(half, exact)[0],
            "order": problem.solver.facts.order,
        }
        if self.metric:
            self.record.reference["metrics"] = self.metrics(exact)
        self.record.save()

    def cell(self, solver: str, schedule: str, budget: int) -> None:
        """Measure one solver on one grid with at most `budget` evaluations, unless that is known; or say why not."""
        key = {"solver": solver, "schedule": schedule, "budget": budget}
        known = self.record.find(**key)
        if known and ("metrics" in known or not self.metric):
            return
        try:
            row = key | self._measure(solver, schedule, budget)
        except SuiteError as error:
            self.record.leave_out(str(error), **key)
        else:
            self.record.rows = [r for r in self.record.rows if r is not known] + [row]
        self.record.save()

    def _measure(self, solver: str, schedule: str, budget: int) -> dict[str, Any]:
        steps = steps_within(self._solver(solver, schedule, budget), budget)
        plan = self.plan(solver, schedule, steps)
        with attributed(None, "", plan.manager.active):
            problem = self.problem(plan)
            got = problem.sample(f"{solver}, {schedule}, {budget} evaluations", problem.own)
        error, deviation = relative_error(got, self.exact)
        drawn = problem.solver.facts.stochastic
        row = {
            "steps": steps,
            "evaluations": problem.counter.depth / len(got),
            "nfe": problem.counter.nfe / len(got),
            "error": None if drawn else error,
            "stderr": None if drawn else deviation,
        }
        return row | ({"metrics": self.metrics(got)} if self.metric else {})

    def _solver(self, solver: str, schedule: str, budget: int) -> Solver:
        """The solver by itself, to ask how often it evaluates."""
        first: ConfigError | None = None
        for steps in range(budget, 0, -1):  # a grid that was fitted takes one number of steps
            try:
                plan = self.plan(solver, schedule, steps)
                break
            except ConfigError as error:
                first = first or error
        else:
            assert first is not None
            raise first
        out = plan.manager.solver(self.engine.modality.noise, replace(self.run, steps=budget))
        if out.facts.adaptive or out.facts.order < 1:
            why = "picks its own times" if out.facts.adaptive else "does not converge to the data (order 0)"
            raise ConfigError(f"the solver {solver} {why}: it has no error at a number of evaluations")
        return out

    def metrics(self, x0: Sequence[Tensor]) -> dict[str, float]:
        """The modality's own numbers of these samples."""
        modality, artifacts, at = self.engine.modality, [], 0
        for part in x0:
            request = self.engine.request(self.prompts[at : at + len(part)])
            artifacts += modality.decode(part, request)
            at += len(part)
        return modality.metrics(artifacts, self.prompts)

    def same_times(self, schedules: Sequence[str], solver: str, steps: int) -> dict[str, str]:
        """Schedules whose grid is that of an earlier one, and which."""
        seen: list[tuple[str, Tensor]] = []
        out: dict[str, str] = {}
        for schedule in schedules:
            try:
                times = self.problem(self.plan(solver, schedule, steps)).own
            except SuiteError:
                continue  # its cells will say so
            twin = next((n for n, t in seen if t.shape == times.shape and torch.allclose(t, times, atol=1e-9)), None)
            if twin:
                out[schedule] = twin
            else:
                seen.append((schedule, times))
        return out


def steps_within(solver: Solver, evaluations: int) -> int:
    """The most steps whose evaluations are at most this many.

    Raises:
        ConfigError: not even the fewest steps are.
    """
    for steps in range(evaluations, 0, -1):
        if solver.evaluations(steps) <= evaluations:
            if steps < solver.facts.min_steps:
                break
            return steps
    raise ConfigError(f"{evaluations} evaluations are too few: it needs at least {solver.facts.min_steps} steps")


def reference_grid(noise: NoiseSchedule, steps: int, interval: tuple[float, float]) -> Tensor:
    """Times from 1 to 0, half of them even in t and half in log-SNR, down to sigma = `FLOOR` alpha, from where one
    step goes to 0: below it an x0 that is a little wrong at every t goes on changing x for ever.

    There are stops at both edges of guidance, and others just outside: there the guided denoiser jumps, and a step
    across it would be of first order, whatever the solver.
    """
    low, high = interval
    least = float(noise.time_at(torch.tensor(-2 * math.log(FLOOR), dtype=torch.float64)))
    fine = torch.linspace(TOP, max(least, EDGE), 20_001, dtype=torch.float64)
    log_snr = noise.log_snr(fine)
    share = ((log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0]) + (fine[0] - fine) / (fine[0] - fine[-1])) / 2
    inner = np.interp(np.linspace(0, 1, max(2, steps - 1)), share.numpy(), fine.numpy())
    times = {1.0, 0.0, *inner.tolist()}
    for edge, outside in ((low, low - EDGE), (high, high + EDGE)):
        if least < edge < 1:
            times = {t for t in times if abs(t - edge) > 2 * EDGE} | {edge, outside}
    return torch.tensor(sorted(times, reverse=True), dtype=torch.float64)
