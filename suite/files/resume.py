"""`--resume`: which results of a request are there already, whole, and of the same request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.host.plan import Plan
from suite.request import Request

if TYPE_CHECKING:
    from suite.modality import Modality


@dataclass(frozen=True)
class Asked:
    """What decides a result, but for the machine: one of these is in every file, and one is asked for each row."""

    prompt: Any
    seed: Any
    model_hash: Any
    negative: Any
    recipe: Any
    options: Any
    init: Any

    def difference(self, other: Asked) -> str:
        """The first field in which they differ, with both values; empty if they are equal."""
        for name, mine in vars(self).items():
            theirs = vars(other)[name]
            if mine != theirs:
                return f"{name.replace('_', ' ')} {_short(mine)}, not {_short(theirs)}"
        return ""


def present(plan: Plan, request: Request, seeds: Sequence[int], files: Sequence[Path], overwrite: bool) -> set[int]:
    """The rows of a request that need not be made: their file is there, whole, and says the same request.

    Raises:
        ConfigError: a file is cut off, not of this suite or of another request, and may not be replaced.
    """
    cls = plan.modality.load()
    init = [request.init.sha256, request.init.strength] if request.init else None
    common = (plan.folder.hash, request.negative, _plain(plan.recipe.to_dict()), _plain(dict(request.options)), init)
    rows = [Asked(prompt, seed, *common) for prompt, seed in zip(request.prompts, seeds, strict=True)]
    found: set[int] = set()
    for file in dict.fromkeys(files):
        wanted = [row for row, place in enumerate(files) if place == file]
        if os.path.lexists(file):
            found |= _matching(cls, file, {row: rows[row] for row in wanted}, overwrite)
    return found


def _matching(cls: type[Modality], file: Path, wanted: Mapping[int, Asked], overwrite: bool) -> set[int]:
    """The wanted rows that are in one file."""
    try:
        contents = [_said(content) for content in cls.read_whole(file)]
    except (ConfigError, ValueError, KeyError, TypeError, IndexError) as error:
        if overwrite:
            return set()
        raise ConfigError(
            f"--resume: {file} is no whole result ({error}); add --overwrite to make it again, or take another -o"
        ) from error
    free, found = dict(wanted), set()
    for content in contents:
        row = next((row for row, asked in free.items() if asked == content), None)
        if row is None:
            if overwrite:
                return set()
            why = content.difference(next(iter((free or wanted).values())))
            raise ConfigError(
                f"--resume: {file} is of another request: {why or 'it is there twice'}; ask for the same, take another "
                "-o, or add --overwrite"
            )
        found.add(row)
        del free[row]
    return found


def _said(content: Mapping[str, Any]) -> Asked:
    report, index = content["suite"], content["index"]
    start = report.get("start")
    return Asked(
        report["prompts"][index],
        report["seeds"][index],
        report["model_hash"],
        report["negative"],
        report["recipe"],
        report["options"],
        [start["sha256"], start["strength"]] if start else None,
    )


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
