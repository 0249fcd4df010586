"""`suite schedule optimize`: fit a grid of times to a model, measure what it gains, and write it down."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from suite.cli.fit import check_file, method_of
from suite.cli.generate import Device, Dtype, Model, RecipeName, Scale, _single
from suite.cli.job import open_engine
from suite.errors import ConfigError, PluginError
from suite.files.output import free
from suite.files.untrusted import message
from suite.fitting import grid as grids
from suite.fitting.grid_fit import GRIDS, Fitted, GridMethod, ModelProblem
from suite.host import prompts as texts
from suite.host.bounds import MAX_BATCH, MAX_EVALUATIONS, MAX_STEPS, check_numbers
from suite.host.device import check_device
from suite.host.discovery import installed
from suite.host.plan import Plan, make_plan
from suite.observe.report import versions
from suite.recipe import from_options

ModalityName = Annotated[str, typer.Argument(metavar="MODALITY", help="An installed modality, e.g. image.")]
Method = Annotated[
    str, typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="How: ays, dp, dm, search, or one you installed.")
]
Steps = Annotated[int, typer.Option(metavar="N", help="Steps of the grid.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to.  [default: model-method-solver-N.json]")
]
Solvers = Annotated[
    list[str] | None,
    typer.Option("--solver", metavar="NAME[:OPTION=VALUE,...]", help="The solver that the grid is for."),
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompt", metavar="PROMPT", help="What to sample; @FILE takes a prompt a line.  [the modality's]"),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Samples that it is fitted to.")]
Checks = Annotated[int, typer.Option("--check", metavar="N", help="Other samples that the gain is measured on.")]
Reference = Annotated[int, typer.Option(metavar="N", help="Even steps that count as exact.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of the first sample; each further one adds 1.")]
Batch = Annotated[int, typer.Option(metavar="B", help="Samples evaluated at once.")]
Json = Annotated[bool, typer.Option("--json", help="Print the grid and what was measured as JSON, and nothing else.")]


@dataclass(frozen=True)
class Job:
    """A checked request for a grid."""

    plan: Plan
    method: GridMethod
    text: str
    file: Path
    prompts: list[str]
    samples: int
    checks: int
    reference: int
    seed: int
    batch: int
    device: str | None

    def run(self) -> tuple[grids.GridFile, dict[str, Any]]:
        """Fit, measure, write; returns the grid and the numbers."""
        started = time.perf_counter()
        with open_engine(self.plan, self.device) as engine, progress() as on_call:
            fitting = self._problem(engine, self.seed, self.samples, on_call)
            fitted = self.method.fit(fitting)
            self._check(fitted, fitting)
            checking = self._problem(engine, self.seed + self.samples, self.checks, on_call)
            errors = self._errors(fitted, checking)
            calls = fitting.counter.depth + checking.counter.depth
        recipe, folder = self.plan.recipe, self.plan.folder
        numbers = {
            "objective": fitted.objective,
            "errors": errors,
            "calls": calls,
            "seconds": round(time.perf_counter() - started, 2),
            **fitted.facts,
        }
        made = {
            "method": self.text,
            "modality": self.plan.modality.name,
            "model": folder.name,
            "guidance": recipe.guidance,
            "guidance_interval": recipe.guidance_interval,
            "prompts": self.prompts,
            "seed": self.seed,
            "samples": self.samples,
            "checks": self.checks,
            "reference": self.reference,
            **{k: numbers[k] for k in ("objective", "errors")},
            "versions": versions("efficient-diffusion-suite", "torch"),
        }
        times = tuple(float(t) for t in fitted.times)
        grid = grids.GridFile(times, grids.stamp_of(folder, recipe), folder.facts.get("noise"), made)
        grids.write(self.file, grid)
        return grid, numbers

    def _problem(self, engine: Any, seed: int, count: int, on_call: Callable[[str, int, int], None]) -> ModelProblem:
        prompts = [self.prompts[k % len(self.prompts)] for k in range(count)]
        return ModelProblem(engine, prompts, range(seed, seed + count), self.batch, self.reference, on_call)

    def _check(self, fitted: Fitted, problem: ModelProblem) -> None:
        from suite.diffusion.noise import as_time
        from suite.diffusion.schedule import check_timesteps

        try:
            check_timesteps(as_time(fitted.times), problem.steps)
        except ConfigError as error:
            raise PluginError(f"the method {self.text} made a grid that cannot be used: {error}") from error

    def _errors(self, fitted: Fitted, problem: ModelProblem) -> dict[str, float]:
        """Error against many steps, on samples that nothing was fitted to: of the grid and of the recipe's own."""
        if self.checks == 0 or problem.noise.discrete or problem.solver.facts.stochastic:
            return {}  # two runs of a solver that draws noise differ by more than their grids
        from suite.diffusion.noise import as_time

        own = self.plan.manager.schedule(problem.noise, replace(problem.run, steps=problem.steps))
        return {
            "fitted": problem.error(as_time(fitted.times)),
            str(self.plan.recipe.schedule): problem.error(own.timesteps(problem.noise, problem.steps)),
        }


def optimize(
    modality: ModalityName,
    method: Method = "ays",
    steps: Steps = 10,
    model: Model = None,
    solver: Solvers = None,
    guidance: Scale = None,
    recipe: RecipeName = None,
    prompt: Prompts = None,
    samples: Samples = 16,
    checks: Checks = 8,
    reference: Reference = 100,
    seed: Seed = 0,
    batch: Batch = 8,
    dtype: Dtype = None,
    device: Device = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Fit a grid of times to a model and a solver; prints the file, which --schedule grid:file=FILE uses."""
    named, built = method_of(method, GRIDS, GridMethod)
    check_device(device)
    check_numbers(
        ("--steps", steps, 2, MAX_STEPS), ("--samples", samples, 1, texts.MAX_SAMPLES),
        ("--check", checks, 0, texts.MAX_SAMPLES), ("--reference", reference, 2, MAX_EVALUATIONS),
        ("--batch", batch, 1, MAX_BATCH),
    )  # fmt: skip
    wanted = from_options(steps=steps, guidance=guidance, dtype=dtype, solver=_single("solver", solver))
    plan = make_plan(modality, recipe, overrides=wanted, model=model, allow_noop=True)
    _refuse(plan, built, named.name)
    assert plan.recipe.solver is not None
    own = "-".join(str(plan.recipe.solver).replace(":", "-").replace("=", "").replace("/", "_").split(","))
    file = output or free(Path(f"{plan.folder.name}-{named.name}-{own}-{steps}{grids.SUFFIX}"))
    check_file(file, grids.SUFFIX)
    asked = texts.read(prompt) if prompt is not None else list(plan.modality.load().calibration_prompts)
    texts.in_turn(asked, samples + checks, seed)  # refuses what it refuses now, not after the model is loaded
    job = Job(plan, built, str(named), file, asked, samples, checks, reference, seed, batch, device)
    for warning in plan.warnings:
        print(f"warning: {message(warning)}", file=sys.stderr)
    grid, numbers = job.run()
    if as_json:
        print(json.dumps({"file": str(file), "times": grid.times, "stamp": asdict(grid.stamp), **numbers}))
        return
    print(file)
    for schedule, error in numbers["errors"].items():
        print(f"error {error:.4f} with {schedule}", file=sys.stderr)


def _refuse(plan: Plan, method: GridMethod, name: str) -> None:
    """What no method, or not this one, can serve; known without torch from the words of the plugins and the model."""
    if plan.modality.load().driver != "sample":
        raise ConfigError(f"{plan.modality.name} draws its times at random: there is no grid to fit")
    words = frozenset().union(*(a.plugin.effects for a in plan.manager.of("solver")))
    if "adaptive-grid" in words:
        raise ConfigError(f"the solver {plan.recipe.solver} picks its own times and would ignore a grid")
    if plan.folder.tokens and not method.tokens:
        fit = [n for n, entry in installed(GRIDS).items() if entry.load().tokens]
        raise ConfigError(f"{name} is for real vectors, and {plan.folder.name} is over tokens; use --method {fit[0]}")
    if method.deterministic and "stochastic-step" in words:
        raise ConfigError(
            f"{name} compares samples of the same seed, but the solver {plan.recipe.solver} draws noise; name a "
            "deterministic one with --solver, or another method"
        )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda title, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)
        yield lambda title, done, total: bar.update(task, description=title, completed=done, total=total)
