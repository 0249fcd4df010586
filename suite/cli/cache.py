"""`suite cache calibrate`: measure what a cache must know of a model, and write it down."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from suite.cli.cache_show import show
from suite.cli.fit import check_file, method_of
from suite.cli.generate import Device, Dtype, Model, RecipeName, Scale, _single
from suite.cli.job import open_engine
from suite.cli.schedule import Batch, Prompts, Seed, progress
from suite.errors import ConfigError
from suite.files.output import free
from suite.files.untrusted import message
from suite.fitting import cache_file
from suite.fitting.cache_file import CacheFile
from suite.fitting.cache_fit import CALIBRATIONS, CacheMethod, EngineProblem
from suite.fitting.stamp import run_stamp_of
from suite.host import prompts as texts
from suite.host.bounds import MAX_BATCH, MAX_STEPS, check_numbers
from suite.host.device import check_device
from suite.host.plan import Plan, make_plan
from suite.observe.report import versions
from suite.recipe import Named, from_options

__all__ = ["calibrate", "show"]

Method = Annotated[str, typer.Argument(metavar="METHOD[:OPTION=VALUE,...]", help="The cache, e.g. teacache.")]
Modality = Annotated[str, typer.Option(metavar="NAME", help="An installed modality.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Steps of the run.  [default: the recipe's]")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to.  [default: method-model-N.json]")
]
Solvers = Annotated[
    list[str] | None, typer.Option("--solver", metavar="NAME[:OPTION=VALUE,...]", help="The solver of the run.")
]
Schedules = Annotated[
    list[str] | None, typer.Option("--schedule", metavar="NAME[:OPTION=VALUE,...]", help="The schedule of the run.")
]
Samples = Annotated[int, typer.Option(metavar="N", help="Samples that it is fitted to.")]
Checks = Annotated[int, typer.Option("--check", metavar="N", help="Other samples that it is checked on.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was measured as JSON, and nothing else.")]


@dataclass(frozen=True)
class Job:
    """A checked request for a calibration."""

    plan: Plan
    method: CacheMethod
    named: Named
    file: Path
    prompts: list[str]
    samples: int
    checks: int
    seed: int
    batch: int
    device: str | None

    def run(self) -> tuple[CacheFile, dict[str, Any]]:
        """Measure and write; returns the file's content and the numbers."""
        started = time.perf_counter()
        count = self.samples + self.checks
        prompts = [self.prompts[k % len(self.prompts)] for k in range(count)]
        with open_engine(self.plan, self.device) as engine, progress() as on_call:
            seeds = range(self.seed, self.seed + count)
            problem = EngineProblem(engine, prompts, seeds, self.checks, self.batch, on_call)
            measured = self.method.fit(problem)
            calls = problem.counter.depth
        recipe, folder = self.plan.recipe, self.plan.folder
        made = {
            "method": str(self.named),
            "modality": self.plan.modality.name,
            "model": folder.name,
            "guidance": recipe.guidance,
            "guidance_interval": recipe.guidance_interval,
            "prompts": self.prompts,
            "seed": self.seed,
            "samples": self.samples,
            "checks": self.checks,
            **measured.facts,
            "versions": versions("efficient-diffusion-suite", "torch"),
        }
        stamp = run_stamp_of(folder, recipe)
        content = CacheFile(self.named.name, stamp, tuple(problem.times), measured.values, made)
        cache_file.write(self.file, content)
        return content, {**measured.facts, "calls": calls, "seconds": round(time.perf_counter() - started, 2)}


def calibrate(
    method: Method,
    modality: Modality = "image",
    steps: Steps = None,
    model: Model = None,
    solver: Solvers = None,
    schedule: Schedules = None,
    guidance: Scale = None,
    recipe: RecipeName = None,
    prompt: Prompts = None,
    samples: Samples = 12,
    checks: Checks = 4,
    seed: Seed = 0,
    batch: Batch = 4,
    dtype: Dtype = None,
    device: Device = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Calibrate a cache to a model and a run; prints the file, which --cache METHOD:file=FILE uses."""
    named, built = method_of(method, CALIBRATIONS, CacheMethod)
    check_device(device)
    check_numbers(
        ("--steps", steps, 2, MAX_STEPS), ("--samples", samples, 1, texts.MAX_SAMPLES),
        ("--check", checks, 1, texts.MAX_SAMPLES), ("--batch", batch, 1, MAX_BATCH),
    )  # fmt: skip
    wanted = from_options(
        steps=steps,
        guidance=guidance,
        dtype=dtype,
        solver=_single("solver", solver),
        schedule=_single("schedule", schedule),
    )
    plan = make_plan(modality, recipe, overrides=wanted, model=model, allow_noop=True)
    _refuse(plan, named.name)
    assert plan.recipe.steps is not None
    default = f"{cache_file.default_name(named.name, plan.folder.name, plan.recipe.steps)}{cache_file.SUFFIX}"
    file = output or free(Path(default))
    check_file(file, cache_file.SUFFIX)
    asked = texts.read(prompt) if prompt is not None else list(plan.modality.load().calibration_prompts)
    texts.in_turn(asked, samples + checks, seed)  # refuses what it refuses now, not after the model is loaded
    for warning in plan.warnings:
        print(f"warning: {message(warning)}", file=sys.stderr)
    content, numbers = Job(plan, built, named, file, asked, samples, checks, seed, batch, device).run()
    if as_json:
        print(json.dumps({"file": str(file), "stamp": asdict(content.stamp), **numbers}))
        return
    print(file)
    for key, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        if not isinstance(value, list | dict):
            print(f"{key} {shown}", file=sys.stderr)


def _refuse(plan: Plan, name: str) -> None:
    """What no calibration can serve; known without torch."""
    if plan.modality.load().driver != "sample":
        raise ConfigError(f"{plan.modality.name} draws its times at random: {name} has no steps to measure")
    if plan.recipe.cache:
        raise ConfigError(f"the recipe names the cache {plan.recipe.cache[0]}; calibrate with a recipe that has none")
    words = frozenset().union(*(a.plugin.effects for a in plan.manager.of("solver")))
    if "adaptive-grid" in words:
        raise ConfigError(f"the solver {plan.recipe.solver} picks its own times, so {name} has no steps to measure")
