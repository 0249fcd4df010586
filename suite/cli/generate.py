"""`suite image PROMPT` and its siblings: read the options and refuse what cannot work, before torch is loaded."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from suite.cli.job import Job, is_writer
from suite.cli.launch import MAX_RANKS, start_ranks, to_start
from suite.diffusion.start import Init
from suite.errors import ConfigError, SuiteError
from suite.files.output import check_folder, check_report, next_number, place, taken, targets
from suite.files.printable import short
from suite.host import prompts as texts
from suite.host.bounds import MAX_BATCH, check_numbers
from suite.host.device import check_device
from suite.host.discovery import MODALITIES, installed
from suite.host.plan import Plan, make_plan
from suite.recipe import Recipe, from_options
from suite.request import RequestOption, resolve

PLUGIN = "NAME[:OPTION=VALUE,...]"
METAVARS = {int: "N", float: "X", str: "TEXT", bool: None}

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="What to generate; @FILE takes a prompt a line, @@ is a plain @.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        parser=place,
        help="File or existing folder.  [default: the prompt's words; text is printed]",
    ),
]
Model = Annotated[str | None, typer.Option(metavar="NAME_OR_DIR", help="A shipped model or a model folder.")]
Num = Annotated[int, typer.Option(metavar="N", help="Samples of each prompt.")]
Seed = Annotated[str, typer.Option(metavar="S", help="Seed of the first sample, or `random`; each further one adds 1.")]
HoldSeed = Annotated[bool, typer.Option("--hold-seed", help="Begin every prompt at the same seed.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Solver steps.")]
Scale = Annotated[float | None, typer.Option("--guidance", metavar="G", help="Guidance scale; 1 means none.")]
Interval = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Times, 0 to 1, between which guidance acts; 1 is noise.  [default: 0,1]"),
]
Negative = Annotated[str, typer.Option(metavar="TEXT", help="What to keep away from.")]
InitFile = Annotated[Path | None, typer.Option("--init", metavar="FILE", help="Begin with this file instead of noise.")]
Strength = Annotated[
    float | None,
    typer.Option(metavar="S", help="Share of the steps that are run after --init; 1 keeps nothing.  [default: 0.6]"),
]
Schedules = Annotated[
    list[str] | None, typer.Option("--schedule", metavar=PLUGIN, help="Times at which the network runs.")
]
Solvers = Annotated[
    list[str] | None, typer.Option("--solver", metavar=PLUGIN, help="How to get from one time to the next.")
]
Caches = Annotated[
    list[str] | None,
    typer.Option("--cache", metavar=PLUGIN, help="What to reuse between steps; repeatable, `none` drops the recipe's."),
]
Compress = Annotated[
    list[str] | None,
    typer.Option("--compress", metavar=PLUGIN, help="How to shrink the network; repeatable, likewise."),
]
Parallelize = Annotated[
    list[str] | None,
    typer.Option("--parallelize", metavar=PLUGIN, help="How to use several ranks; repeatable, likewise."),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE_OR_NAME", help="A recipe; options above go over it.")
]
Dtype = Annotated[Literal["auto", "bf16", "fp32"] | None, typer.Option(help="What the network computes in.")]
Device = Annotated[
    str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps.  [default: a GPU if there is one]")
]
Batch = Annotated[int, typer.Option(metavar="B", help="Samples generated at once.")]
Launch = Annotated[int, typer.Option(metavar="N", help="Start N ranks on this machine; see --parallelize.")]
Exact = Annotated[bool, typer.Option("--exact", help="Refuse plugins that change the result.")]
AllowNoop = Annotated[bool, typer.Option("--allow-noop", help="Accept a plugin that finds nothing to do.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write files and reports there as JSON.")
]
CacheLimit = Annotated[
    float | None,
    typer.Option(metavar="MIB", help="Most memory that caches may hold.  [default: half of the device's]"),
]
Blocks = Annotated[bool, typer.Option("--blocks", help="Record which blocks run at which step for the report.")]
Macs = Annotated[bool, typer.Option("--macs", help="Count multiply-accumulates for the report; slow.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Make only what is missing of this request; needs -o. Numbers begin at 000."),
]
Json = Annotated[bool, typer.Option("--json", help="Print files and reports as JSON, and nothing else.")]


def command(modality: str, with_options: bool = True) -> Callable[..., int]:
    """The command that generates one modality.

    Args:
        with_options: ask the modality which options it declares, which imports its module.
    """
    declared = _declared(modality) if with_options else ()

    def generate(
        context: typer.Context,
        prompt: Prompt,
        output: Output = None,
        model: Model = None,
        num: Num = 1,
        seed: Seed = "0",
        hold_seed: HoldSeed = False,
        steps: Steps = None,
        guidance: Scale = None,
        guidance_interval: Interval = None,
        negative: Negative = "",
        init: InitFile = None,
        strength: Strength = None,
        schedule: Schedules = None,
        solver: Solvers = None,
        cache: Caches = None,
        cache_limit: CacheLimit = None,
        compress: Compress = None,
        parallelize: Parallelize = None,
        recipe: RecipeName = None,
        dtype: Dtype = None,
        device: Device = None,
        batch: Batch = 8,
        launch: Launch = 1,
        exact: Exact = False,
        allow_noop: AllowNoop = False,
        report: ReportFile = None,
        macs: Macs = False,
        blocks: Blocks = False,
        overwrite: Overwrite = False,
        resume: Resume = False,
        as_json: Json = False,
        **asked: Any,
    ) -> int:
        prompts, seeds = texts.expand(texts.read(prompt), num, seed, hold_seed)
        check_numbers(("--batch", batch, 1, MAX_BATCH), ("--launch", launch, 1, MAX_RANKS))
        check_device(device)
        if strength is not None and init is None:
            raise ConfigError(f"--strength {strength:g} is for --init FILE; add a file, or leave it out")
        options = resolve(declared, {option.name: asked[_variable(option)] for option in declared}, modality)
        overrides = from_options(
            steps=steps,
            guidance=guidance,
            guidance_interval=interval_of(guidance_interval),
            dtype=dtype,
            schedule=_single("schedule", schedule),
            solver=_single("solver", solver),
            compress=compress or (),
            parallelize=parallelize or (),
            cache=cache or (),
        )
        plan = make_plan(
            modality,
            recipe,
            overrides=overrides if overrides != Recipe() else None,  # then the recipe keeps its name
            model=model,
            exact=exact,
            allow_noop=allow_noop,
            cache_limit=cache_limit,
        )
        start = Init.of(plan.modality.load(), init, strength) if init else None
        if resume and output is None:
            raise ConfigError("--resume needs -o: without it there is no telling which files are of this request")
        files = _files(plan, output, prompts, report, overwrite, resume)
        if to_start(launch):
            return start_ranks(plan, context.obj, launch, seeds[0])
        if seed == texts.RANDOM and is_writer():
            print(f"seed: {seeds[0]}", file=sys.stderr)
        fresh = not overwrite and not resume and output not in files
        how = (device, batch, report, macs, blocks, as_json, fresh, resume, overwrite)
        return Job(plan, prompts, seeds, files, negative, options, start, *how).run()

    generate.__doc__ = f"Generate {modality} from a prompt."
    return _with_flags(generate, declared)


def interval_of(text: str | None) -> tuple[float, float] | None:
    """Two times, as `--guidance-interval` takes them.

    Raises:
        ConfigError: it is no two numbers; whether they are times is the recipe's to say.
    """
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--guidance-interval {short(text)}: expected two times like 0.2,0.8") from None
    return low, high


def _declared(modality: str) -> Sequence[RequestOption]:
    """The options of a modality; none if it cannot be imported, which is reported when it is used."""
    try:
        return installed(MODALITIES)[modality].load().options
    except SuiteError:
        return ()


def _variable(option: RequestOption) -> str:
    return option.name.replace("-", "_")


def _with_flags(function: Callable[..., int], declared: Sequence[RequestOption]) -> Callable[..., int]:
    """The function with a flag for each declared option in place of `**asked`."""
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {p.name for p in own}
    for option in declared:
        if _variable(option) in taken:
            raise ConfigError(f"the option --{option.name} of a modality is one that every command has")
        metavar = "|".join(option.choices) or METAVARS[option.kind]
        default = "the model's" if option.default is None else option.default
        flag = typer.Option(f"--{option.name}", metavar=metavar, help=f"{option.help}  [default: {default}]")
        kind = Annotated[option.kind | None, flag]
        own.append(inspect.Parameter(_variable(option), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    function.__signature__ = signature.replace(parameters=own)  # pyright: ignore[reportFunctionMemberAccess]
    function.__annotations__ = {p.name: p.annotation for p in own}
    return function


def _single(hook: str, values: list[str] | None) -> str | None:
    if values and len(values) > 1:
        raise ConfigError(f"--{hook} is given {len(values)} times ({', '.join(values)}); name only one of them")
    return values[0] if values else None


def _files(
    plan: Plan, output: Path | None, prompts: list[str], report: Path | None, overwrite: bool, resume: bool
) -> list[Path]:
    """One file a sample. Everything that can be refused without the modality's code is refused before it loads."""
    if report is not None:
        check_folder(report.parent)
        check_report(report, overwrite)
    folder = output if output and os.path.isdir(output) else (output or Path("x")).parent
    check_folder(folder)
    modality = plan.modality.load()
    suffixes = modality.suffixes
    if output is None and modality.printable:
        return []
    if output is not None:
        files = targets(output, len(prompts), suffixes, modality.joins, modality.beside, overwrite or resume)
    else:

        def first(slug: str, shared: bool) -> int | None:
            if overwrite:
                return 0 if shared else None
            if not shared and not taken(Path(slug + suffixes[0]), modality.beside):
                return None
            return max(next_number(Path(), f"{slug}-"), 0 if shared else 1)

        files = [Path(name + suffixes[0]) for name in texts.names(prompts, plan.modality.name, first)]
    modality.check_suffix(files[0].suffix.lower())
    own = {os.path.realpath(file.with_name(file.name + end)) for file in files for end in ("", *modality.beside)}
    if report is not None and os.path.realpath(report) in own:
        raise ConfigError(f"--report {report} is also a result's file, or lies beside one; give another name")
    return files
