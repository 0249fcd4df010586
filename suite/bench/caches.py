"""Caches against no cache and against fewer steps: time of interleaved rounds, error from the same noise, memory."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.optimize import isotonic_regression
from torch import Tensor

from suite.bench.record import Record
from suite.engine.engine import Engine
from suite.errors import SuiteError
from suite.fitting.grid_fit import relative_error
from suite.host.plan import Plan

CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the steps at which the solver alone is measured; every second one where no times are asked for."""
OTHER_SEEDS = 10_000
"""Added to the seeds of the run that says how much of a quality number is chance."""


@dataclass
class CacheBench:
    """The measurements of one request.

    Attributes:
        engine: the loaded model.
        plan: (cache or "", steps) -> plan; ConfigError if they do not go together.
        prompts, seeds: one sample each.
        batch: samples at once.
        rounds: how often each is timed; 0 leaves times out, and with them the steps of equal time.
        record: what is known; written after every cell and every round.
        metric: also the modality's own quality numbers.
        on_call: called with (title, done, in all).
    """

    engine: Engine
    plan: Callable[[str, int], Plan]
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int
    rounds: int
    record: Record
    metric: bool = False
    on_call: Callable[[str, int, int], None] = lambda title, done, total: None
    exact: dict[int, list[Tensor]] = field(default_factory=dict)

    def measure(self, steps: int, caches: Sequence[str]) -> None:
        """All caches at this many steps: first what each does once, then the rounds, then steps of equal time."""
        self._row(steps, "", steps)
        shares = CURVE if self.rounds else CURVE[1::2]
        curve = sorted({max(1, round(steps * share)) for share in shares} - {steps}, reverse=True)
        timed = [self._row(steps, cache, steps) for cache in caches]
        timed += [self._row(steps, "", run) for run in curve]
        if self.metric:
            self._other_seeds(steps)
        if not self.rounds:
            return
        self._time(steps, [row for row in timed if row is not None])
        for cache in caches:
            row = self.record.find(steps=steps, cache=cache, run_steps=steps)
            if row is not None:
                self._compare(steps, row)

    def _row(self, steps: int, cache: str, run_steps: int) -> dict[str, Any] | None:
        """The row of one cell, with what one run of it tells; None if it cannot run, which is said."""
        row = self.record.find(steps=steps, cache=cache, run_steps=run_steps)
        if row is not None and (row["metrics"] or not self.metric):
            return row
        try:
            plan = self.plan(cache, run_steps)
            self.on_call(f"{cache or 'no cache'}, {run_steps} of {steps} steps", 0, 1)
            found = self._once(plan, steps)
        except SuiteError as reason:
            self.record.leave_out(str(reason), cache=cache, steps=run_steps)
            return None
        if row is None:
            row = {"steps": steps, "cache": cache, "run_steps": run_steps, "seconds": [], "uncached": []}
            self.record.rows.append(row)
        row |= found
        self.record.save()
        return row

    def _other_seeds(self, steps: int) -> None:
        """The row of the run without a cache from other noise: its numbers differ from the plain run's by chance."""
        key: dict[str, Any] = {"steps": steps, "cache": "", "run_steps": steps, "other_seeds": True}
        if self.record.find(**key) is None:
            plan = self.plan("", steps)
            self.on_call(f"other seeds, {steps} steps", 0, 1)
            seeds, engine = [seed + OTHER_SEEDS for seed in self.seeds], self.engine.under(plan)
            results = list(engine.stream(self.prompts, seeds, batch=self.batch))
            found = engine.modality.metrics([a for r in results for a in r.artifacts], self.prompts)
            nothing = {"seconds": [], "uncached": [], "error": None, "stderr": None, "nfe": results[0].report.nfe}
            self.record.rows.append(key | nothing | {"metrics": found})
            self.record.save()

    def _once(self, plan: Plan, steps: int) -> dict[str, Any]:
        x0, artifacts, reports = [], [], []
        engine = self.engine.under(plan)
        for result in engine.stream(self.prompts, self.seeds, batch=self.batch):
            x0.append(result.content.cpu())
            artifacts += result.artifacts
            reports.append(result.report)
        named = [p for p in reports[0].plugins if p.hook == "cache"]
        if not named and plan.recipe.steps == steps:
            self.exact[steps] = x0
        elif steps not in self.exact:  # another process measured the row, but the samples are not kept
            self.exact[steps] = self._samples(self.plan("", steps))
        error, deviation = relative_error(x0, self.exact[steps])
        out: dict[str, Any] = {"error": error, "stderr": deviation, "nfe": reports[0].nfe}
        if named:
            (own,) = named
            facts = own.facts
            out |= {"did": own.did, "what": own.what, "skipped_share": facts.get("skipped_share"),
                    "bytes_held": facts.get("bytes_held"), "warnings": list(plan.warnings)}  # fmt: skip
        return out | {"metrics": engine.modality.metrics(artifacts, self.prompts) if self.metric else {}}

    def _samples(self, plan: Plan) -> list[Tensor]:
        return [r.content.cpu() for r in self.engine.under(plan).stream(self.prompts, self.seeds, batch=self.batch)]

    def _seconds(self, plan: Plan) -> float:
        """Sampling time of one sample."""
        results = self.engine.under(plan).stream(self.prompts, self.seeds, batch=self.batch)
        return sum(r.report.seconds["sample"] for r in results) / len(self.prompts)

    def _time(self, steps: int, rows: Sequence[dict[str, Any]]) -> None:
        """Rounds in turn: no cache first, then every row that has too few, so that a ratio is of one moment."""
        plain = self.plan("", steps)
        for number in range(self.rounds):
            missing = [row for row in rows if len(row["seconds"]) <= number]
            if not missing:
                continue
            uncached = self._seconds(plain)
            for done, row in enumerate(missing):
                self.on_call(f"{steps} steps, round {number + 1} of {self.rounds}", done, len(missing))
                row["seconds"].append(self._seconds(self.plan(row["cache"], row["run_steps"])))
                row["uncached"].append(uncached)
            self.record.save()
        for row in rows:
            ratios = [a / b for a, b in zip(row["seconds"], row["uncached"], strict=True)]
            low, high = quartiles(ratios)
            row |= {"ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}
        self.record.save()

    def _compare(self, steps: int, row: dict[str, Any]) -> None:
        """The most steps without a cache that take no longer than the cache, and their error."""
        curve = {r["run_steps"]: r["ratio"] for r in self.record.rows
                 if r["steps"] == steps and not r["cache"] and "ratio" in r}  # fmt: skip
        fewer = steps_in(row["ratio"], curve | {steps: 1.0})
        row["same_time_steps"] = fewer
        if fewer is not None and fewer < steps:
            other = self._row(steps, "", fewer)
            if other is not None:
                row |= {"same_time_error": other["error"], "same_time_metrics": other["metrics"]}
        self.record.save()


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; the ends of what there is of fewer than two values."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def steps_in(ratio: float, curve: dict[int, float]) -> int | None:
    """The most steps whose time, linear between those that were measured, is at most `ratio` of all steps' time.

    More steps never take less time: where measured times say so, neighbours are averaged (isotonic regression).
    None where not even one step is short enough, by the line through the two fewest.
    """
    ordered = sorted(curve.items())
    rising = isotonic_regression([time for _, time in ordered]).x.tolist()
    known = list(zip((steps for steps, _ in ordered), rising, strict=True))
    (first, low), (second, high) = known[0], known[1 if len(known) > 1 else 0]
    slope = (high - low) / (second - first) if second > first and high > low else math.inf
    best: int | None = None
    for steps in range(1, known[-1][0] + 1):
        if steps <= first:
            time = low - (first - steps) * (0.0 if slope == math.inf else slope)
        else:
            (a, x), (b, y) = next((p, q) for p, q in itertools.pairwise(known) if q[0] >= steps)
            time = x + (y - x) * (steps - a) / (b - a)
        if time <= ratio:
            best = steps
    return best
