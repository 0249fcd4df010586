"""What every value on a command line must be: there, and text. One rule for all commands and all their options."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from suite.errors import ConfigError, OutputError
from suite.files.printable import short

MAY_BE_EMPTY = frozenset({"negative", "prompt"})
"""To one an empty text means something; the other has a message of its own."""


def guard(command: Any) -> None:
    """Let a command, and those below it, refuse values that are empty or no text, before they are converted.

    A path made of "" is the present folder, and an unset variable of a shell is "": it would change the run unseen.
    """
    for parameter in command.params:
        parameter.consume_value = _guarded(parameter, parameter.consume_value)
    for below in getattr(command, "commands", {}).values():
        guard(below)


def _guarded(parameter: Any, consume: Callable[[Any, Mapping[str, Any]], Any]) -> Callable[..., Any]:
    def checked(context: Any, given: Mapping[str, Any]) -> Any:
        values = given.get(parameter.name)
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, str):
                _check(parameter, value)
        return consume(context, given)

    return checked


def _check(parameter: Any, value: str) -> None:
    option = parameter.opts[-1] if parameter.opts[-1].startswith("-") else str(parameter.metavar or parameter.name)
    if not value and parameter.name not in MAY_BE_EMPTY:
        raise ConfigError(f"{option} is empty: is a variable of the shell unset? Give a value, or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option} {short(value, 200)} is not UTF-8; type it anew, or rename the file") from None


def check_streams() -> None:
    """Refuse to work without a standard output, and put nothing in the place of one.

    A closed stream's number goes to the next file that is opened: whatever a library prints would be written there.

    Raises:
        ConfigError: standard output is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # python sets it so if it was closed at the start
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
        raise ConfigError("standard output is closed; to see nothing, send it away with > /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt's letters need not be the terminal's


def flush() -> None:
    """Write what was printed.

    Raises:
        OutputError: it cannot be, as on a full disk.
        BrokenPipeError: the reader left.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard()
        raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error


def discard() -> None:
    """Let what is left to print go nowhere: the interpreter's own last flush must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
