"""Training in stages: settings that change on the way, written down in one training file.

    train: {steps: 6500, until: 4000}
    stages:
      - {train.until: 4750, train.steps: 5600}
      - {train.until: 7000, train.steps: 7000, styles.flat: 0.2}

The file's own settings are the first stage; each further one lays its own over those of the one before it, and goes on
from its last checkpoint. `--set` lies over all stages.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.training.checkpoint import latest, step_of
from suite.training.config import tree_of

Train = Callable[..., Path]


def in_stages(train: Train) -> Train:
    """`train(config_path, data, out, resume, overrides, minutes)`, called once for each stage of the file.

    A run that stops early (Ctrl-C, minutes) leaves the rest of the stages to `resume`.
    """

    @functools.wraps(train)
    def staged(
        config_path: Path | str,
        data: Path | str,
        out: Path | str,
        resume: bool = False,
        overrides: Sequence[str] = (),
        minutes: float | None = None,
    ) -> Path:
        stages = stages_of(config_path)
        end, result = time.monotonic() + 60 * (minutes or 0), Path(out)
        for number, (settings, until) in enumerate(stages):
            found = latest(Path(out))
            last = number == len(stages) - 1
            if resume and found and not last and step_of(found) >= until:
                continue
            left = (end - time.monotonic()) / 60 if minutes else None
            if left is not None and left <= 0:
                break
            result = train(config_path, data, out, resume, (*settings, *overrides), left)
            found = latest(Path(out))
            # `out` itself comes back after Ctrl-C, which may fall on the last step of a stage.
            if last or result == Path(out) or found is None or step_of(found) < until:
                break
            resume = True
        return result

    return staged


def stages_of(path: Path | str) -> list[tuple[tuple[str, ...], int]]:
    """Overrides of each stage and the step at which it ends (0 for the last); one stage without overrides, by default.

    Raises ConfigError for stages that are not mappings or whose ends do not rise.
    """
    tree = tree_of(Path(path))
    stages = tree.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{path}: stages is {stages!r}, expected a list of settings such as {{train.until: 4000}}")
    train = tree.get("train")
    until = train.get("until", 0) if isinstance(train, dict) else 0
    found: list[tuple[tuple[str, ...], int]] = [((), until)]
    settings: dict[str, Any] = {}
    for stage in stages:
        settings = settings | stage
        until = settings["train.until"] = stage.get("train.until", 0)
        found.append((tuple(f"{key}={json.dumps(value)}" for key, value in settings.items()), until))
    ends = [end for _, end in found[:-1]]
    if not all(isinstance(end, int) and end > 0 for end in ends) or ends != sorted(set(ends)):
        raise ConfigError(f"{path}: all stages but the last need a train.until, rising; got {ends}")
    return found
