"""`suite replay`, `suite doctor`, `suite data`, `suite train`: read the options, hand over, print."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suite.errors import ConfigError, PluginError
from suite.files.inputs import YAML, check, is_file
from suite.files.output import check_folder, check_names, free, place, targets
from suite.files.untrusted import message
from suite.host.bounds import MAX_SIZE, check_numbers
from suite.host.discovery import MODALITIES, find, installed

if TYPE_CHECKING:
    from suite.modality import Modality

Result = Annotated[Path, typer.Argument(metavar="FILE", help="A result of this suite.")]
Replica = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", parser=place, help="Where to.  [default: beside FILE, with -replay]"
    ),
]
Model = Annotated[str | None, typer.Option(metavar="FOLDER", help="The model, if it is not a shipped one.")]
InitFile = Annotated[
    Path | None, typer.Option("--init", metavar="FILE", help="The file with which it began, if it did.")
]
Trust = Annotated[bool, typer.Option("--trust", help="FILE is your own: its recipe may name grids and other files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
ModalityName = Annotated[str, typer.Argument(metavar="MODALITY", help="An installed modality, e.g. image.")]
Size = Annotated[int | None, typer.Option(metavar="N", help="Size of a sample; the modality says of what.")]
Cache = Annotated[Path | None, typer.Option(metavar="DIR", help="Where downloads and results are kept.")]
Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="What to train, as YAML.")]
Data = Annotated[Path | None, typer.Option(metavar="FILE", help="What `suite data prepare` made.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where checkpoints and the model go.  [default: the configuration's name]"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Minutes = Annotated[float | None, typer.Option(metavar="M", help="Stop, with a checkpoint, after so long.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration; repeatable.")
]


def replay(
    file: Result,
    output: Replica = None,
    model: Model = None,
    init: InitFile = None,
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Make a saved result again from its own metadata. Exit code 0 if it is the same bit for bit, else 1."""
    from suite.host import replay as again

    record = again.read(file)
    start = again.init_of(record, init)
    target = _target(file, output, record.modality)
    plan = again.plan_of(record, model, trust)
    done = again.run(record, plan, target, start, fresh=output is None)
    for warning in done.warnings:
        print(f"warning: {message(warning)}", file=sys.stderr)
    verdict = "is bit-identical to" if done.identical else "differs from"
    if as_json:
        print(json.dumps({"identical": done.identical, "files": [str(done.output)], "warnings": done.warnings}))
    else:
        print(f"{done.output} {verdict} {file}")
    return 0 if done.identical else 1


def _target(file: Path, output: Path | None, modality: type[Modality]) -> Path:
    """Where a replay goes: beside the file, under a name that is free, unless one is given."""
    if output is None:
        short = file.stem
        while len(os.fsencode(short)) > 150:  # with its number, its ending and what lies beside it, it must be a name
            short = short[:-1]
        output = file.with_name(f"{short}-replay{file.suffix}")
        output = free(output, modality.beside)
    (target,) = targets(output, 1, modality.suffixes, beside=modality.beside)
    return target


def doctor(as_json: Json = False) -> int:
    """Say what is here, what is missing, and how to get it. Exit code 1 if something required is missing."""
    from suite.cli.listing import table
    from suite.host import doctor as checks

    found = list(checks.run())
    if as_json:
        print(json.dumps({"checks": [asdict(c) for c in found]}, indent=2))
    else:
        table(("check", "state", "what is here", "what to type"), [(c.name, c.state, c.detail, c.fix) for c in found])
    return 1 if any(c.state == checks.BROKEN for c in found) else 0


def prepare(modality: ModalityName, size: Size = None, cache: Cache = None) -> None:
    """Fetch and prepare the training data of a modality; prints where it is."""
    check_numbers(("--size", size, 1, MAX_SIZE))
    function = _function(modality, "data", "prepare", "training data to prepare")
    options = {"size": size, "cache": cache}
    print(function(**{k: v for k, v in options.items() if v is not None}))


def train(
    modality: ModalityName,
    config: Config,
    data: Data = None,
    out: Out = None,
    resume: Resume = False,
    minutes: Minutes = None,
    changes: Sets = None,
) -> None:
    """Train a model of a modality; prints where it is."""
    check(config, "configuration", YAML)
    if data is None or not is_file(data):
        got = "--data is missing" if data is None else f"no training data {data}"
        raise ConfigError(f"{got}; `suite data prepare {modality}` makes it and prints where it is")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise ConfigError(f"--minutes {minutes}: expected a number above 0")
    folder = out or Path(config.stem)
    check_folder(folder if os.path.exists(folder) else folder.parent)
    check_names([folder])
    function = _function(modality, "training", "train", "training code")
    print(function(config, data, folder, resume=resume, overrides=tuple(changes or ()), minutes=minutes))


def _function(modality: str, module: str, name: str, what: str) -> Callable[..., Any]:
    """`name` of the module `module` beside the modality's entry point."""
    entry = find(modality, installed(MODALITIES), "modality")
    path = f"{entry.target.partition(':')[0]}.{module}"
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if f"{path}.".startswith(f"{error.name}."):
            raise ConfigError(f"modality {entry.origin} has no {what}") from error
        raise PluginError(f"modality {entry.origin}: {path} needs {error.name}, which is not installed") from error
    except ImportError as error:
        raise PluginError(f"modality {entry.origin}: {path} cannot be loaded: {error}") from error
    if not callable(function := getattr(found, name, None)):
        raise ConfigError(f"modality {entry.origin} has no {what}: {path} has no function {name!r}")
    return function
