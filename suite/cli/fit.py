"""What the commands that fit something to a model have in common: reading the method, and checking the request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from suite.errors import ConfigError, PluginError
from suite.files.output import check_folder, check_names
from suite.host.discovery import find, installed
from suite.plugin import build, options_of
from suite.recipe import Named

Method = TypeVar("Method")


def method_of(text: str, group: str, base: type[Method]) -> tuple[Named, Method]:
    """A method by its text, `name:option=value`, with every option of it written out.

    Args:
        group: entry points that it is one of.
        base: the class that it must be below.

    Raises:
        ConfigError: there is none of this name, or an option is wrong.
        PluginError: it is of another kind.
    """
    named = Named.parse(text)
    cls = find(named.name, installed(group), "method").load()
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"the method {text} is not a subclass of {base.__module__}.{base.__qualname__}")
    built = build(cls, named.options, name=named.name)
    return Named(named.name, {key: getattr(built, key) for key in options_of(cls)}), built


def check_file(file: Path, suffix: str) -> None:
    """Refuse a result that could not be written, before hours of work.

    Raises:
        ConfigError: it ends in something else, is a folder, or lies in none.
    """
    if file.suffix != suffix or os.path.isdir(file):
        raise ConfigError(f"-o {file}: expected a file that ends in {suffix}")
    check_folder(file.parent)
    check_names([file])
