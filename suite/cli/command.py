"""The command `suite`. Nothing on this path imports torch: help, listings and refusals must be quick."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import typer

from suite.cli import generate as cli_generate
from suite.cli import listing as cli_list
from suite.cli import work as cli_work
from suite.cli.words import check_streams, discard, flush, guard
from suite.errors import OutputError, SuiteError
from suite.files.untrusted import message
from suite.host.discovery import MODALITIES, installed

NAME = "suite"
DISTRIBUTION = "efficient-diffusion-suite"
DEBUG = "SUITE_DEBUG"


@dataclass(frozen=True)
class Group:
    """Commands below one word: functions, by the module that has them."""

    summary: str
    modules: Mapping[str, tuple[str, ...]]


#: Imported only when they are named: their many options cost every other command's start.
ON_DEMAND = {
    "schedule": Group("Fit grids of times to a model.", {"suite.cli.schedule": ("optimize",)}),
    "cache": Group("Calibrate caches to a model, and see what they reuse.", {"suite.cli.cache": ("calibrate", "show")}),
    "bench": Group(
        "Measure what methods cost and lose.",
        {"suite.cli.bench": ("solvers", "caches"), "suite.cli.bench_quality": ("quality",)},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 unexpected, 2 refused, 3 a plugin did nothing, 130 stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_streams()
        command: Any = typer.main.get_command(application(words[0] if words else ""))
        guard(command)
        code = command.main(words or ["--help"], prog_name=NAME, standalone_mode=False, obj=words)
        flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader left, as `head` does
        discard()
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return refuse(error, as_json="--json" in words)


def application(named: str = "") -> typer.Typer:
    """The commands: one a modality that is installed, then those that are always there.

    Only the modality that is `named` is asked for its own options, because that imports its module.
    """
    app = group("Generate with diffusion models; every method that makes it cheaper is a plugin.")
    app.callback()(version)
    for name in installed(MODALITIES):
        app.command(name)(cli_generate.command(name, with_options=name == named))
    app.command()(cli_work.replay)
    for title, commands in cli_list.GROUPS.items():
        sub = group(commands.summary)
        for name, function in commands.functions.items():
            sub.command(name)(function)
        app.add_typer(sub, name=title)
    app.command()(cli_work.doctor)
    for title, commands in ON_DEMAND.items():
        sub = group(commands.summary)
        sub.callback()(lambda: None)
        if title == named:
            for path, names in commands.modules.items():
                module = importlib.import_module(path)
                for name in names:
                    sub.command(name)(getattr(module, name))
        app.add_typer(sub, name=title)
    data = group("Fetch and prepare training data.")
    data.callback()(lambda: None)
    data.command()(cli_work.prepare)
    app.add_typer(data, name="data")
    app.command()(cli_work.train)
    return app


def group(text: str) -> typer.Typer:
    """A Typer without its own decorations: plain help is quick and reads the same everywhere."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    return typer.Typer(
        help=text,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=settings,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version(DISTRIBUTION))
        raise typer.Exit


def version(
    show: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the command itself."""
    del show


def refuse(error: Exception, as_json: bool) -> int:
    """Say in one message what went wrong; returns the exit code."""
    text, code = explain(error)
    text = message(text)
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    with suppress(OSError):  # nobody reads
        if as_json and rank == "0":
            print(json.dumps({"error": text}))
            flush()
        else:
            print(f"error{f' (rank {rank})' if rank != '0' else ''}: {text}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """(message, exit code) of an error."""
    if isinstance(error, SuiteError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not error.filename:
        return f"what was made cannot be written: {error.strerror}", OutputError.exit_code
    if hasattr(error, "format_message"):  # a usage error; its class differs between versions of Typer
        context = getattr(error, "ctx", None)
        where = f"; see `{context.command_path} --help`" if context else ""
        return error.format_message().rstrip(".") + where, 2  # pyright: ignore[reportAttributeAccessIssue]
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}; {DEBUG}=1 shows the traceback", 1


if __name__ == "__main__":
    sys.exit(main())
