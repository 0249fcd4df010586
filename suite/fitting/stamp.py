"""Stamps: what a file of fitted numbers was fitted to. No torch here.

Numbers that were fitted to one model, noise schedule, solver and number of steps say nothing about another: their
file carries all of these, and one that does not fit the request is refused before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from suite.errors import ConfigError, SuiteError
from suite.files.inputs import read_json
from suite.files.output import write_text
from suite.host.discovery import find, installed
from suite.host.models import ModelFolder
from suite.plugin import build, options_of
from suite.recipe import Named, Recipe


@dataclass(frozen=True)
class Stamp:
    """What a grid, or anything else that needs no more than this, was fitted to.

    Attributes:
        model: sha256 of the weights.
        noise: sha256 of the noise schedule's description.
        solver: as a recipe names it, with all its options.
        steps: number of steps.
    """

    model: str
    noise: str
    solver: str
    steps: int

    def differences(self, other: Stamp) -> list[str]:
        """What differs, as text: this stamp's value, then the other's."""
        out = []
        if self.model != other.model:
            out.append(f"another model (weights {self.model[:12]}, not {other.model[:12]})")
        if self.noise != other.noise:
            out.append(f"another noise schedule (description {self.noise[:12]}, not {other.noise[:12]})")
        if _today(self.solver) != _today(other.solver):
            out.append(f"the solver {self.solver}, not {other.solver}")
        if self.steps != other.steps:
            out.append(f"{self.steps} steps, not {other.steps}")
        return out

    @classmethod
    def read(cls, data: Any, what: str) -> Self:
        """A stamp from a file's content.

        Raises:
            ConfigError: something is missing or of another type; `what` says where.
        """
        kinds = {f.name: int if f.name == "steps" else str for f in fields(cls)}
        if not isinstance(data, Mapping) or any(type(data.get(k)) is not kind for k, kind in kinds.items()):
            texts = ", ".join(k for k in kinds if k != "steps")
            raise ConfigError(f"{what}: its stamp must give {texts} as texts and steps as a number")
        return cls(**{k: data[k] for k in kinds})


@dataclass(frozen=True)
class RunStamp(Stamp):
    """What numbers along a run were fitted to: they depend on the times and on what was done to the weights too.

    Attributes:
        schedule: as a recipe names it, with all its options.
        compress: the same of all compressors, joined by `+`; empty if there are none.
    """

    schedule: str
    compress: str

    def differences(self, other: Stamp) -> list[str]:
        out = super().differences(other)
        if isinstance(other, RunStamp):
            if _today(self.schedule) != _today(other.schedule):
                out.append(f"the schedule {self.schedule}, not {other.schedule}")
            if self.compress != other.compress:
                out.append(f"compress {self.compress or 'none'}, not {other.compress or 'none'}")
        return out


def canonical(named: Named) -> str:
    """A plugin with all its options, so that `deis` and `deis:order=3` are one if 3 is the default.

    Raises:
        ConfigError: there is no such plugin, or it does not take the options.
    """
    cls = find(named.name, installed()).load()
    instance = build(cls, named.options, name=named.name)
    return str(Named(named.name, {name: getattr(instance, name) for name in options_of(cls)}))


def _today(text: str) -> str:
    """A stored `canonical` text with the options that the plugin has now: one that came since has its default."""
    try:
        return canonical(Named.parse(text))
    except SuiteError:  # no longer installed, or without such an option: it differs from whatever is asked for
        return text


def stamp_of(folder: ModelFolder, recipe: Recipe) -> Stamp:
    """The stamp of a complete request."""
    assert recipe.solver is not None and recipe.steps is not None
    return Stamp(folder.hash, digest(folder.facts.get("noise")), canonical(recipe.solver), recipe.steps)


def digest(description: Any) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def run_stamp_of(folder: ModelFolder, recipe: Recipe) -> RunStamp:
    """The stamp of a complete request with its schedule and compressors."""
    assert recipe.schedule is not None
    base = stamp_of(folder, recipe)
    compress = "+".join(canonical(named) for named in recipe.compress or ())
    return RunStamp(base.model, base.noise, base.solver, base.steps, canonical(recipe.schedule), compress)


def read_stamped(path: Path, form: str, what: str) -> Mapping[str, Any]:
    """The content of a JSON file of this format.

    Raises:
        ConfigError: it cannot be read, is not JSON, or is of another format.
    """
    data = read_json(path, what)
    if not isinstance(data, Mapping) or data.get("format") != form:
        raise ConfigError(f'{path} is not a {what}: expected an object with "format": "{form}"')
    return data


def write_stamped(path: Path, form: str, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write such a file atomically.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    write_text(path, json.dumps({"format": form, **content}, indent=indent) + "\n")
