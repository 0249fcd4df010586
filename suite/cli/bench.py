"""`suite bench solvers` and `suite bench caches`: what methods gain and lose, on any model. Checked without torch."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suite.bench.record import Record
from suite.cli.generate import PLUGIN, Device, Dtype, Model, RecipeName, Scale, _single
from suite.cli.job import open_engine
from suite.cli.listing import table
from suite.cli.schedule import progress
from suite.errors import ConfigError, SuiteError
from suite.files.output import check_folder
from suite.files.printable import short
from suite.files.untrusted import message
from suite.host import prompts as texts
from suite.host.bounds import MAX_BATCH, MAX_EVALUATIONS, MAX_STEPS, check_numbers
from suite.host.device import check_device
from suite.host.discovery import installed
from suite.host.manager import implemented_hooks, load
from suite.host.plan import Plan, make_plan
from suite.observe.report import versions
from suite.plugin import Plugin
from suite.recipe import Named, Recipe

if TYPE_CHECKING:
    from suite.engine.engine import Engine

NONE = (Named("none"),)

ModalityName = Annotated[str, typer.Argument(metavar="MODALITY", help="An installed modality, e.g. image.")]
ManySolvers = Annotated[
    list[str] | None,
    typer.Option("--solver", metavar=PLUGIN, help="Repeatable.  [default: every one that draws no noise]"),
]
ManySchedules = Annotated[
    list[str] | None, typer.Option("--schedule", metavar=PLUGIN, help="Repeatable.  [default: every one that fits]")
]
Budgets = Annotated[str, typer.Option("--evaluations", metavar="N,N,...", help="Evaluations that a run may take.")]
Reference = Annotated[int, typer.Option(metavar="N", help="Evaluations of the run that counts as exact.")]
ReferenceSolver = Annotated[str, typer.Option(metavar=PLUGIN, help="Its solver.")]
Prompts = Annotated[
    str | None,
    typer.Option("--prompt", metavar="PROMPT", help="What to sample; @FILE takes a prompt a line.  [the modality's]"),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Samples, prompts in turn.")]
Batch = Annotated[int, typer.Option(metavar="B", help="Samples evaluated at once.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of the first sample; each further one adds 1.")]
Metric = Annotated[bool, typer.Option("--metric", help="Also the modality's own quality numbers.")]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where to.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what lies in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was measured as JSON, and nothing else.")]


@dataclass(frozen=True)
class Request:
    """What both benches are told.

    Attributes:
        base: a recipe for all cells: guidance, dtype, compressors.
        prompts, seeds: one a sample.
    """

    modality: str
    model: str | None
    recipe: str | None
    base: Recipe
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch: int
    device: str | None
    metric: bool

    def plan(self, over: Recipe) -> Plan:
        """The plan of one cell. ConfigError if it cannot work."""
        return make_plan(self.modality, self.recipe, overrides=over.over(self.base), model=self.model)

    def facts(self, plan: Plan, **more: Any) -> dict[str, Any]:
        """What a record must agree in to be gone on with."""
        recipe = plan.recipe
        return {
            "modality": plan.modality.name,
            "model": plan.folder.name,
            "model_hash": plan.folder.hash,
            "dtype": recipe.dtype,
            "guidance": recipe.guidance,
            "guidance_interval": list(recipe.guidance_interval or ()),
            "compress": [str(c) for c in recipe.compress],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            **more,
        }


def request_of(
    modality: str,
    model: str | None,
    recipe: str | None,
    base: Recipe,
    prompt: str | None,
    samples: int,
    batch: int,
    seed: int,
    device: str | None,
    metric: bool,
) -> Request:
    """Check what both benches are told, and that there is something to sample."""
    check_device(device)
    check_numbers(("--samples", samples, 1, texts.MAX_SAMPLES), ("--batch", batch, 1, MAX_BATCH))
    plan = make_plan(modality, recipe, overrides=base, model=model)
    cls = plan.modality.load()
    if cls.driver != "sample":
        raise ConfigError(f"{modality} draws its times at random: there are no steps to compare")
    asked = texts.read(prompt) if prompt is not None else list(cls.calibration_prompts)
    prompts, seeds = texts.in_turn(asked, samples, seed)
    return Request(modality, model, recipe, base, tuple(prompts), tuple(seeds), batch, device, metric)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1 to 10000, separated by commas, each once and in order."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1 or values[-1] > 10_000:
        raise ConfigError(f"{option} {short(text)}: expected whole numbers from 1 to 10000, like 5,10,20")
    return tuple(values)


def chosen(
    hook: str, asked: Sequence[str] | None, modality: str, refuse: Callable[[Plugin], str | None], record: Record
) -> list[str]:
    """Those that were asked for, or the `bench_options` of every installed plugin of the hook.

    `refuse` says why a plugin has no number here; that is an error if it was asked for, else it is left out.
    """
    if asked:
        out = [str(Named.parse(text)) for text in asked]
        for text in out:
            plugin = _one(hook, Named.parse(text), modality)
            if why := refuse(plugin):
                raise ConfigError(f"--{hook} {text} {why}")
        return list(dict.fromkeys(out))
    out, targets = [], set()
    for name, entry in installed().items():
        try:
            cls = entry.load()
            if hook not in implemented_hooks(cls) or entry.target in targets:
                continue  # another name of the same class has been here
            targets.add(entry.target)
            for options in cls.bench_options:
                text = str(Named(name, options))
                if why := refuse(_one(hook, Named(name, options), modality)):
                    record.leave_out(f"it {why}", **{hook: text})
                else:
                    out.append(text)
        except SuiteError as error:
            record.leave_out(str(error), **{hook: name})
    return out


def _one(hook: str, named: Named, modality: str) -> Plugin:
    one: Any = named if hook in ("schedule", "solver") else (named,)
    (active,) = load(Recipe(**{hook: one}), installed(), modality)
    return active.plugin


@contextmanager
def measuring(request: Request, plan: Plan, record: Record) -> Iterator[tuple[Engine, Callable[[str, int, int], None]]]:
    """The loaded model and a progress bar; at the end, however it comes, what is known is on disk."""
    for warning in plan.warnings:
        print(f"warning: {message(warning)}", file=sys.stderr)
    with open_engine(plan, request.device) as engine, progress() as on_call:
        import torch

        machine = {"device": engine.device, "dtype": engine.dtype, "threads": torch.get_num_threads()}
        record.made = machine | versions("efficient-diffusion-suite", "torch")
        try:
            yield engine, on_call
        finally:
            record.save()


def can_plot() -> bool:
    """Whether the extra for plots is here; says so if not."""
    if find_spec("matplotlib"):
        return True
    print("no plot: matplotlib is missing; pip install 'efficient-diffusion-suite[bench]'", file=sys.stderr)
    return False


def finish(record: Record, as_json: bool, show: Callable[[Record], None]) -> None:
    """Print the table, or everything as JSON, and what was left out."""
    if as_json:
        print(json.dumps(record.to_dict()))
        return
    show(record)
    by_reason: dict[str, list[str]] = {}
    for entry in record.left_out:
        what = " ".join(str(value) for key, value in entry.items() if key != "reason")
        by_reason.setdefault(entry["reason"], []).append(what)
    for reason, what in by_reason.items():
        shown = ", ".join(what[:8]) + (f" and {len(what) - 8} more" if len(what) > 8 else "")
        print(f"left out: {shown}: {reason}", file=sys.stderr)
    print(record.file)


# ---- solvers -----------------------------------------------------------------------------------


def solvers(
    modality: ModalityName,
    model: Model = None,
    solver: ManySolvers = None,
    schedule: ManySchedules = None,
    evaluations: Budgets = "5,8,10,15,20,50",
    reference: Reference = 1000,
    reference_solver: ReferenceSolver = "heun",
    guidance: Scale = None,
    recipe: RecipeName = None,
    prompt: Prompts = None,
    samples: Samples = 8,
    batch: Batch = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    metric: Metric = False,
    output: Folder = Path(),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Error of solvers and grids against many evaluations from the same noise, at equal numbers of evaluations."""
    budgets = numbers(evaluations, "--evaluations")
    check_numbers(("--reference", reference, 1, MAX_EVALUATIONS))
    if reference < 2 * budgets[-1]:
        raise ConfigError(f"--reference {reference}: expected at least twice the most --evaluations, {budgets[-1]}")
    base = Recipe(steps=budgets[-1], guidance=guidance, dtype=dtype or "fp32", cache=NONE)
    request = request_of(modality, model, recipe, base, prompt, samples, batch, seed, device, metric)
    plan = request.plan(Recipe())
    if plan.folder.tokens:
        raise ConfigError(
            f"{plan.folder.name} is over tokens: its solvers draw them, so runs of the same seed differ by more than "
            "their steps; take a model of real vectors"
        )
    check_folder(output)
    referring = str(Named.parse(reference_solver))
    if why := _no_reference(_one("solver", Named.parse(referring), modality)):
        raise ConfigError(f"--reference-solver {referring} {why}")
    facts = request.facts(plan, reference=reference, reference_solver=referring)
    record = Record.open(output, "solvers", facts, resume=resume)

    def refuse(plugin: Plugin) -> str | None:
        words = plugin.effects
        if "adaptive-grid" in words or "variable-evaluations" in words:
            return "decides from the data how often it evaluates, so it cannot be given a number of evaluations"
        if "stochastic-step" in words and not (metric and solver):
            return "draws noise, so its distance to another run says nothing; name it with --metric"
        return None

    methods = chosen("solver", solver, modality, refuse, record)
    grids = chosen("schedule", schedule, modality, lambda plugin: None, record)

    @functools.cache  # a plan takes some milliseconds, and its plugins keep nothing
    def cell(solver: str, schedule: str, steps: int) -> Plan:
        return request.plan(Recipe(solver=Named.parse(solver), schedule=Named.parse(schedule), steps=steps))

    if schedule and solver:
        _check_pairs(cell, methods, grids, budgets)
    plots = can_plot()
    with measuring(request, plan, record) as (engine, on_call):
        from suite.bench.solvers import SolverBench

        bench = SolverBench(engine, cell, request.prompts, request.seeds, batch, record, metric, on_call)
        bench.refer(referring, reference)
        twins = {} if schedule else bench.same_times(grids, methods[0], budgets[-1])
        for twin, of in twins.items():
            record.leave_out(f"its times are those of {of}", schedule=twin)
        for method in methods:
            for grid in grids:
                for budget in budgets if grid not in twins else ():
                    bench.cell(method, grid, budget)
    if plots:
        from suite.bench import plot

        plot.solvers(record)
    finish(record, as_json, show_solvers)


def _no_reference(plugin: Plugin) -> str | None:
    if plugin.effects & {"adaptive-grid", "variable-evaluations", "stochastic-step"}:
        return "draws noise or picks its own times; name one that does not, like heun"
    return None


def _check_pairs(
    cell: Callable[[str, str, int], Plan], methods: Sequence[str], grids: Sequence[str], budgets: Sequence[int]
) -> None:
    """Refuse a request in which no pair goes together at any number of steps."""
    first: ConfigError | None = None
    for method in methods:
        for grid in grids:
            for steps in range(budgets[-1], 0, -1):
                try:
                    cell(method, grid, steps)
                    return
                except ConfigError as error:
                    first = first or error
    if first:
        raise first


def show_solvers(record: Record) -> None:
    """One row a pair, best first; a column for each number of evaluations."""
    reference = record.reference
    budgets = sorted({row["budget"] for row in record.rows})
    best = {b: min((r["error"] for r in record.rows if r["budget"] == b and r["error"]), default=0.0) for b in budgets}
    rows = []
    for pair in dict.fromkeys((row["solver"], row["schedule"]) for row in record.rows):
        cells = [record.find(solver=pair[0], schedule=pair[1], budget=b) for b in budgets]
        rank = sum((c["error"] or 0) / best[b] for c, b in zip(cells, budgets, strict=True) if c and best[b] > 0)
        missing = sum(c is None or c["error"] is None for c in cells)
        rows.append((missing, rank, [*pair, *(_error(c, best[b]) for c, b in zip(cells, budgets, strict=True))]))
    table(("solver", "schedule", *map(str, budgets)), [row for *_, row in sorted(rows, key=lambda r: r[:2])])
    print(
        f"relative error of x0 ± one standard error over {len(record.request['seeds'])} samples, * the least; "
        f"the reference, {reference['solver']} with {reference['evaluations']} evaluations, "
        f"is {reference['half_differs']:.2g} from itself with half of them"
    )


def _error(row: Mapping[str, Any] | None, best: float) -> str:
    if row is None:
        return "-"
    if row["error"] is None:
        return "drawn"
    spread = "" if row["stderr"] is None else f" ± {row['stderr']:.1g}"
    return f"{row['error']:.3g}{spread}{' *' if row['error'] == best else ''}"


# ---- caches ------------------------------------------------------------------------------------

Steps = Annotated[str, typer.Option("--steps", metavar="N,N,...", help="Numbers of solver steps.")]
Rounds = Annotated[
    int, typer.Option(metavar="N", help="How often each is timed, in turn; 0 with --metric: quality alone.")
]
OneSolver = Annotated[
    list[str] | None, typer.Option("--solver", metavar=PLUGIN, help="The solver of all runs.  [default: the recipe's]")
]
OneSchedule = Annotated[
    list[str] | None, typer.Option("--schedule", metavar=PLUGIN, help="Their times.  [default: the recipe's]")
]
ManyCaches = Annotated[
    list[str] | None,
    typer.Option("--cache", metavar=PLUGIN, help="Repeatable.  [default: every one, at settings of its own]"),
]


def caches(
    modality: ModalityName,
    model: Model = None,
    cache: ManyCaches = None,
    steps: Steps = "50,20",
    rounds: Rounds = 5,
    solver: OneSolver = None,
    schedule: OneSchedule = None,
    guidance: Scale = None,
    recipe: RecipeName = None,
    prompt: Prompts = None,
    samples: Samples = 8,
    batch: Batch = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    metric: Metric = False,
    output: Folder = Path(),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """What caches save and lose, beside the same solver with as many steps fewer as take the same time."""
    counts = numbers(steps, "--steps")
    check_numbers(("--rounds", rounds, 0, MAX_STEPS))
    if rounds < (0 if metric else 1):
        raise ConfigError(f"--rounds {rounds}: expected at least 1, or 0 with --metric, which leaves times out")
    times, method = _single("schedule", schedule), _single("solver", solver)
    base = Recipe(
        steps=counts[-1],
        guidance=guidance,
        dtype=dtype,
        cache=NONE,
        schedule=Named.parse(times) if times else None,
        solver=Named.parse(method) if method else None,
    )
    request = request_of(modality, model, recipe, base, prompt, samples, batch, seed, device, metric)
    plan = request.plan(Recipe())
    if "adaptive-grid" in plan.manager.of("solver")[0].plugin.effects:
        raise ConfigError(f"the solver {plan.recipe.solver} picks its own times: there are no steps to compare")
    check_folder(output)
    facts = request.facts(plan, solver=str(plan.recipe.solver), schedule=str(plan.recipe.schedule), batch=batch)
    record = Record.open(output, "caches", facts, resume=resume)
    names = chosen("cache", cache, modality, lambda plugin: None, record)

    @functools.cache
    def cell(name: str, count: int) -> Plan:
        return request.plan(Recipe(steps=count, cache=(Named.parse(name),) if name else NONE))

    if cache:
        for name in names:
            cell(name, counts[-1])  # a rule that forbids it is an error, not a cell that is left out
    if "stochastic-step" in plan.manager.of("solver")[0].plugin.effects:
        print(
            f"warning: {plan.recipe.solver} draws noise, and other steps draw other noise: compare with fewer steps by "
            "--metric, not by the error",
            file=sys.stderr,
        )
    plots = can_plot()
    with measuring(request, plan, record) as (engine, on_call):
        from suite.bench.caches import CacheBench

        prompts, seeds = request.prompts, request.seeds
        bench = CacheBench(engine, cell, prompts, seeds, batch, rounds, record, metric, on_call)
        for count in reversed(counts):
            bench.measure(count, names)
    if plots:
        from suite.bench import plot

        plot.caches(record)
    headline = plan.modality.load().headline

    def show(record: Record) -> None:
        if rounds:
            show_caches(record)
        if metric:
            show_quality(record, headline)

    finish(record, as_json, show)


def show_quality(record: Record, headline: Mapping[str, int]) -> None:
    """One row a cache or smaller number of steps, by error: the modality's headline numbers and their change."""
    rows = []
    for steps in sorted({row["steps"] for row in record.rows}, reverse=True):
        exact = record.find(steps=steps, cache="", run_steps=steps)
        base = (exact or {}).get("metrics", {})
        mine = [row for row in record.rows if row["steps"] == steps and row["metrics"]]
        for row in sorted(mine, key=lambda r: math.inf if r["error"] is None else r["error"]):
            cells = []
            for name in headline:
                if name not in base or name not in row["metrics"]:  # no prompt asks for what it measures
                    cells.append("-")
                    continue
                better = headline[name] * (row["metrics"][name] - base[name]) / (abs(base[name]) or 1.0) + 0.0
                cells.append(f"{row['metrics'][name]:.4g} ({better:+.1%})")
            other, skipped = row.get("other_seeds"), row.get("skipped_share")
            rows.append((
                steps, row["cache"] or ("other seeds" if other else f"{row['run_steps']} steps"),
                "-" if other else f"{row['error']:.3g}", "-" if skipped is None else f"{skipped:.0%}", *cells,
            ))  # fmt: skip
    table(("steps", "run", "error", "skipped", *headline), rows)
    print(
        "in brackets how much better than all steps without a cache, from the same noise (- is worse); other seeds "
        "differ by chance alone"
    )


def show_caches(record: Record) -> None:
    """One row a cache and number of steps, fastest first, beside the fewer steps of the same time."""
    rows = []
    timed = (r for r in record.rows if r["cache"] and "ratio" in r)
    for row in sorted(timed, key=lambda r: (-r["steps"], r["ratio"])):
        fewer = row.get("same_time_error")
        gain = fewer / row["error"] if fewer and row["error"] else None
        skipped, held = row["skipped_share"], row["bytes_held"]
        rows.append((
            row["steps"],
            row["cache"],
            f"{1 / row['ratio']:.2f} [{1 / row['ratio_high']:.2f}, {1 / row['ratio_low']:.2f}]",
            "-" if skipped is None else f"{skipped:.0%}",
            "-" if held is None else f"{held / 2**20:.1f}",
            f"{row['error']:.3g}",
            "-" if fewer is None else f"{row['same_time_steps']} steps: {fewer:.3g}",
            "-" if gain is None else f"{gain:.2f}",
        ))  # fmt: skip
    table(("steps", "cache", "times faster", "skipped", "MiB held", "error", "instead, same time", "gain"), rows)
    print(
        f"{record.request['solver']} on {record.request['schedule']}; relative error of x0 against no cache, from the "
        "same noise; gain is how many times smaller it is than that of the steps that take the same time"
    )
