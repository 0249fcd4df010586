"""What a cache was calibrated to, as a file with a stamp. No torch here.

Magnitudes, changes and routers belong to one model, noise schedule, time grid, solver and number of steps. A file
that does not fit the request is refused before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.fitting.stamp import RunStamp, read_stamped, run_stamp_of, write_stamped
from suite.host.models import ModelFolder
from suite.recipe import CONFIGS, Recipe

FORMAT = "suite-cache/1"
SUFFIX = ".json"
#: Two times of one grid are further apart than this, and one time computed twice is nearer.
SAME = 1e-9


@dataclass(frozen=True)
class CacheFile:
    """Content of a calibration's file.

    Attributes:
        method: the cache that reads it.
        stamp: what it was measured on.
        times: steps + 1 times of the run, from 1 to 0.
        values: what the method measured.
        made: how: modality, prompts, seeds, measured errors, versions.
    """

    method: str
    stamp: RunStamp
    times: tuple[float, ...]
    values: Mapping[str, Any]
    made: Mapping[str, Any] = field(default_factory=dict)

    def index(self, next_t: float) -> int | None:
        """The step that ends at this time; None if there is no such step in the file.

        Looked up by time, because a run that begins in the middle counts its steps from there.
        """
        for step, end in enumerate(self.times[1:]):  # a loop, which torch.compile can trace
            if abs(end - next_t) <= SAME:
                return step
        return None


def shipped() -> dict[str, Path]:
    """Calibrations that come with the suite, by name: method-model-steps."""
    return {p.stem: p for p in sorted((CONFIGS / "calibrations").glob(f"*{SUFFIX}"))}


def default_name(method: str, model: str, steps: int) -> str:
    """The name that a calibration is looked for, where none is given."""
    return f"{method}-{model}-{steps}"


def how_to_make(method: str, modality: str, model: str, recipe: Recipe | None = None) -> str:
    """The command that makes a file."""
    rest = f" --steps {recipe.steps} --solver {recipe.solver} --schedule {recipe.schedule}" if recipe else " --steps N"
    return (
        f"`suite cache calibrate {method} --modality {modality} --model {model}{rest} -o FILE`, "
        f"then --cache {method}:file=FILE"
    )


def find(name_or_path: str | None, method: str, model: str, steps: int) -> Path:
    """The file that is meant: a path, the name of a shipped one, or the shipped one for this model and steps.

    Raises:
        ConfigError: there is none; the message says what to type.
    """
    known = shipped()
    name = name_or_path or default_name(method, model, steps)
    path = known.get(name) or Path(name)
    if not os.path.exists(path) or (name_or_path is None and name not in known):
        mine = [n for n in known if n.startswith(f"{method}-")]
        what = (
            f"no calibration {name_or_path!r}" if name_or_path else f"it needs a calibration for {model}, {steps} steps"
        )
        hint = f"; shipped: {', '.join(mine)}" if mine else ""
        raise ConfigError(f"{method}: {what}{hint}; make one with {how_to_make(method, 'MODALITY', model)}")
    return path


def read(path: Path, method: str) -> CacheFile:
    """A calibration's file.

    Raises:
        ConfigError: it is no calibration, or one for another method.
    """
    data = read_stamped(path, FORMAT, "calibration")
    what = f"calibration {path}"
    if data.get("method") != method:
        raise ConfigError(f"{what} is for the cache {data.get('method')}, not for {method}")
    stamp, times, values = RunStamp.read(data.get("stamp"), what), data.get("times"), data.get("values")
    if not isinstance(times, list) or any(type(t) not in (int, float) for t in times) or len(times) != stamp.steps + 1:
        raise ConfigError(f"{what}: expected {stamp.steps} + 1 times")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}: expected an object `values`")
    return CacheFile(method, stamp, tuple(map(float, times)), values, data.get("made") or {})


def check(file: CacheFile, source: str, recipe: Recipe, folder: ModelFolder) -> None:
    """Refuse a file that was measured on something else.

    Raises:
        ConfigError: what differs, and what to type.
    """
    if different := file.stamp.differences(run_stamp_of(folder, recipe)):
        make = how_to_make(file.method, str(folder.fact("modality")), folder.name, recipe)
        raise ConfigError(
            f"calibration {source} of {file.method} was fitted to {'; '.join(different)}; make one with {make}"
        )


def check_steps(file: CacheFile, source: str, steps: int) -> None:
    """Refuse another number of steps, once more, where the hook is called.

    Raises:
        ConfigError: the numbers differ.
    """
    if steps != file.stamp.steps:
        raise ConfigError(f"calibration {source} of {file.method} was fitted to {file.stamp.steps} steps, not {steps}")


def write(path: Path, file: CacheFile) -> None:
    """Write a calibration atomically.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    write_stamped(path, FORMAT, asdict(file), indent=None)


def curve(file: CacheFile, source: str, name: str, rows: Sequence[str] | None = None) -> Any:
    """A value of the file: evaluations x steps numbers or None, or a mapping of these by part.

    Raises:
        ConfigError: it is missing or has another shape.
    """
    value = file.values.get(name)
    tables = list(value.values()) if rows is not None and isinstance(value, Mapping) else [value]
    good = all(
        isinstance(t, list) and t and all(isinstance(e, list) and len(e) == file.stamp.steps for e in t) for t in tables
    )
    if not good or (rows is not None and not isinstance(value, Mapping)):
        raise ConfigError(f"calibration {source}: {name} must give {file.stamp.steps} numbers for each evaluation")
    return value
