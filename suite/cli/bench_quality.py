"""`suite bench quality`: the modality's own numbers for recipes, with their spread over seeds, beside real content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from suite.bench.record import Record
from suite.cli.bench import Batch, Folder, Json, ModalityName, Prompts, Resume, finish, measuring
from suite.cli.bench import Request as BenchRequest
from suite.cli.generate import Device, Model, check_device
from suite.cli.listing import table
from suite.errors import ConfigError
from suite.files.output import check_folder
from suite.host import prompts as texts
from suite.host.bounds import MAX_BATCH, check_numbers
from suite.recipe import Recipe

Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="FILE_OR_NAME", help="Repeatable.  [default: fast, quality, reference]"),
]
Seeds = Annotated[str, typer.Option("--seeds", metavar="N,N,...", help="One run over all prompts each.")]
Samples = Annotated[
    int | None, typer.Option(metavar="N", help="Samples a run, prompts in turn.  [default: one a prompt]")
]


def quality(
    modality: ModalityName,
    model: Model = None,
    recipe: Recipes = None,
    prompt: Prompts = None,
    samples: Samples = None,
    seeds: Seeds = "0,1,2",
    batch: Batch = 32,
    device: Device = None,
    output: Folder = Path(),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Quality of recipes by the modality's own metrics: mean and spread over seeds, beside real content."""
    try:
        wanted = tuple(dict.fromkeys(int(part) for part in seeds.split(",")))
    except ValueError:
        wanted = ()
    if not wanted or min(wanted) < 0 or max(wanted) > 10**9:
        raise ConfigError(f"--seeds {seeds!r}: expected whole numbers from 0, like 0,1,2")
    check_numbers(("--batch", batch, 1, MAX_BATCH), ("--samples", samples, 1, texts.MAX_SAMPLES))
    check_device(device)
    check_folder(output)
    names = tuple(dict.fromkeys(recipe or ("fast", "quality", "reference")))
    requests = {n: BenchRequest(modality, model, n, Recipe(), (), wanted, batch, device, True) for n in names}
    plans = {name: request.plan(Recipe()) for name, request in requests.items()}
    first = plans[names[0]]
    cls = first.modality.load()
    asked = texts.read(prompt) if prompt is not None else list(cls.benchmark_prompts())
    texts.check(asked)
    prompts = [asked[k % len(asked)] for k in range(samples or len(asked))]
    facts: dict[str, Any] = {
        "modality": modality, "model": first.folder.name, "model_hash": first.folder.hash, "prompts": prompts,
        "recipes": {name: plan.recipe.to_dict() for name, plan in plans.items()},
    }  # fmt: skip
    record = Record.open(output, "quality", facts, resume=resume)
    for name, plan in plans.items():
        with measuring(requests[name], plan, record) as (engine, on_call):
            from suite.bench.quality import measure

            measure(engine, name, prompts, wanted, batch, record, on_call)
    if prompt is None and samples is None and not record.reference:
        record.reference = dict(cls.ceiling())
        record.save()
    finish(record, as_json, show)


def show(record: Record) -> None:
    """A row a number, a column a recipe."""
    from suite.bench.quality import summary

    names = list(dict.fromkeys(row["recipe"] for row in record.rows))
    found = {name: summary([row for row in record.rows if row["recipe"] == name]) for name in names}
    evaluations = {name: next(row["nfe"] for row in record.rows if row["recipe"] == name) for name in names}
    lines = [("evaluations", *(f"{evaluations[name]:g}" for name in names), "")]
    for number in found[names[0]]:
        cells = [_cell(*found[name].get(number, (math.nan, None))) for name in names]
        real = record.reference.get(number)
        lines.append((number, *cells, "" if real is None else f"{real:.3g}"))
    table(("number", *names, "real"), lines)
    count = len({row["seed"] for row in record.rows})
    print(f"mean ± standard deviation over {count} seeds of {len(record.request['prompts'])} samples each")


def _cell(mean: float, spread: float | None) -> str:
    return f"{mean:.3g}" if spread is None else f"{mean:.3g} ± {spread:.2g}"
