"""Optimised grids as files: times with a stamp of what they were fitted to. No torch here.

A grid that was fitted to one model, noise schedule, solver and number of steps says nothing about another: its file
carries all four, and one that does not fit the request is refused before anything is loaded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.fitting.stamp import Stamp, canonical, digest, read_stamped, stamp_of, write_stamped
from suite.recipe import CONFIGS

FORMAT = "suite-grid/1"
SUFFIX = ".json"


@dataclass(frozen=True)
class GridFile:
    """Content of a grid's file.

    Attributes:
        times: steps + 1 times from 1 to 0.
        stamp: what they were fitted to.
        noise: the noise schedule's description, as in a model's suite.json; None if the model has none.
        made: how they were found: method, prompts, seeds, objective, measured errors, versions.
    """

    times: tuple[float, ...]
    stamp: Stamp
    noise: Mapping[str, Any] | None = None
    made: Mapping[str, Any] = field(default_factory=dict)


def shipped() -> dict[str, Path]:
    """Grids that come with the suite, by name."""
    return {p.stem: p for p in sorted((CONFIGS / "grids").glob(f"*{SUFFIX}"))}


def read(name_or_path: str) -> GridFile:
    """A grid's file, or a shipped grid by name.

    Raises:
        ConfigError: it is not there, or is not a grid; the message names the file and what is wrong.
    """
    path = shipped().get(name_or_path) or Path(name_or_path)
    if not os.path.exists(path):
        raise ConfigError(
            f"no grid {name_or_path!r}: it is neither a file nor one of {', '.join(shipped()) or 'the shipped ones'}; "
            "`suite schedule optimize MODALITY --method NAME --steps N` makes one"
        )
    data = read_stamped(path, FORMAT, "grid")
    known = Stamp.read(data.get("stamp"), f"grid {path}")
    times = data.get("times")
    if not isinstance(times, list) or any(type(t) not in (int, float) for t in times):
        raise ConfigError(f"grid {path}: times must be a list of numbers")
    steps = known.steps
    falling = all(a > b for a, b in itertools.pairwise(times))
    if len(times) != steps + 1 or steps < 1 or times[0] != 1 or times[-1] != 0 or not falling:
        raise ConfigError(f"grid {path}: expected {steps} + 1 times that fall from 1 to 0, got {times[:8]}")
    noise, made = data.get("noise"), data.get("made") or {}
    if noise is not None and digest(noise) != known.noise:
        raise ConfigError(f"grid {path}: its noise schedule was changed after it was stamped; fit it again")
    return GridFile(tuple(map(float, times)), known, noise, made)


def write(path: Path, grid: GridFile) -> None:
    """Write a grid atomically.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    write_stamped(path, FORMAT, asdict(grid))


__all__ = ["FORMAT", "SUFFIX", "GridFile", "Stamp", "canonical", "digest", "read", "shipped", "stamp_of", "write"]
