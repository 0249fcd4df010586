"""Checkpoints of a training run: folders `checkpoint-<step>` that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files.inputs import check, read_json
from suite.files.output import atomically
from suite.observe.finite import load_finite

_PREFIX = "checkpoint-"
CHECKPOINT = ("state.json", "network.safetensors", "ema.safetensors", "optimizers.pt")
_FIXED = ("optimizer", "seed")
"""Options that a resumed run may not change: the saved optimizer state, or the random streams, would not fit."""


@dataclass
class TrainState:
    """Everything that a checkpoint keeps: `network`, `ema` (name -> averaged tensor), optimizers, step, seconds."""

    network: nn.Module
    ema: dict[str, Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    interrupted: bool = field(default=False, compare=False)


def latest(out: Path) -> Path | None:
    """The checkpoint of the most steps in a run's folder, or None."""
    found = [p for p in Path(out).glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was taken at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def store(out: Path, state: TrainState, options: Mapping[str, Any]) -> Path:
    """Write `out/checkpoint-<step>`, then remove the older ones. A crash in between leaves the old one in place."""
    target = Path(out) / f"{_PREFIX}{state.step:08d}"
    if target.is_dir():
        return target
    # Cloned: safetensors refuses weights that share memory, as tied embeddings do.
    network = {k: v.detach().clone().contiguous() for k, v in state.network.state_dict().items()}
    facts = {"step": state.step, "seconds": state.seconds, "options": dict(options)}
    older = [p for p in Path(out).glob(f"{_PREFIX}*") if p.is_dir()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomically(target) as made:
        made.mkdir()
        save_file(network, made / "network.safetensors")
        save_file(state.ema, made / "ema.safetensors")
        torch.save([optimizer.state_dict() for optimizer in state.optimizers], made / "optimizers.pt")
        (made / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
    for path in older:
        shutil.rmtree(path)
    return target


def restore(path: Path, state: TrainState, options: Mapping[str, Any]) -> None:
    """Load a checkpoint into `state`, in place.

    Raises ConfigError when it is damaged, of another network, or of options that a resumed run may not change.
    """
    try:
        for part in CHECKPOINT:
            check(path / part, "checkpoint")
        facts = read_json(path / "state.json", "checkpoint")
        for name in _FIXED:
            if facts["options"][name] != options[name]:
                raise ConfigError(
                    f"{path} was trained with train.{name}={facts['options'][name]}, this run asks for "
                    f"{options[name]}: set it back, or choose another folder"
                )
        state.network.load_state_dict(load_finite(path / "network.safetensors"))
        ema = load_finite(path / "ema.safetensors")
        for name, value in state.ema.items():
            value.copy_(ema[name])
        saved = torch.load(path / "optimizers.pt", weights_only=True, map_location="cpu")
        for optimizer, values in zip(state.optimizers, saved, strict=True):
            optimizer.load_state_dict(values)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path} does not fit this run or is damaged: {error}") from error
    state.step, state.seconds = facts["step"], facts["seconds"]
