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

from suite.errors import ConfigError, out_of_memory
from suite.files import inputs
from suite.files.output import atomically
from suite.files.untrusted import Number, Section, Text, Whole, check, shown
from suite.observe.finite import check_tensors, load_finite

_PREFIX = "checkpoint-"
CHECKPOINT = ("state.json", "network.safetensors", "ema.safetensors", "optimizers.pt")
_FIXED = ("optimizer", "seed")
"""Options that a resumed run may not change: the saved optimizer state, or the random streams, would not fit."""
_FACTS = Section(
    {
        "step": Whole(0, 10**12),
        "seconds": Number(0, 1e12),
        "options": Section({"optimizer": Text(100), "seed": Whole(-(2**63))}),
    }
)


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
    for part in CHECKPOINT:
        inputs.check(path / part, "checkpoint")
    facts = check(inputs.read_json(path / "state.json", "checkpoint"), _FACTS, f"checkpoint {path / 'state.json'}")
    for name in _FIXED:
        if facts["options"][name] != options[name]:
            raise ConfigError(
                f"{path} was trained with train.{name}={shown(facts['options'][name])}, this run asks for "
                f"{options[name]}: set it back, or choose another folder"
            )
    network = _tensors(path / "network.safetensors", state.network.state_dict())
    ema = _tensors(path / "ema.safetensors", state.ema)
    _restore_optimizers(path / "optimizers.pt", state.optimizers)
    state.network.load_state_dict(network)
    for name, value in state.ema.items():
        value.copy_(ema[name])
    state.step, state.seconds = facts["step"], facts["seconds"]


def _tensors(file: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, finite and of the names, shapes and dtypes of `expected`."""
    try:
        found = load_finite(file)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(file, error) from error
    if odd := sorted(found.keys() ^ expected.keys()):
        side = "is missing" if odd[0] in expected else "is not of this network"
        raise ConfigError(f"checkpoint {file} does not fit this run: tensor {shown(odd[0])} {side}")
    for name, mine in expected.items():
        theirs = found[name]
        if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            raise ConfigError(
                f"checkpoint {file} does not fit this run: tensor {name} is {theirs.dtype} {list(theirs.shape)}, "
                f"expected {mine.dtype} {list(mine.shape)}"
            )
    return found


def _restore_optimizers(file: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the optimizers' states, whose tensors have to be finite and of their parameters' shapes."""
    try:
        saved = torch.load(file, weights_only=True, map_location="cpu")
        for optimizer, values in zip(optimizers, saved, strict=True):
            order = [p for group in optimizer.param_groups for p in group["params"]]
            for index, entries in values["state"].items():
                check_tensors({f"{index}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}, file)
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.ndim and value.shape != order[index].shape:
                        raise ValueError(f"{index}.{name} is {list(value.shape)}, not {list(order[index].shape)}")
            optimizer.load_state_dict(values)
    except ConfigError:
        raise
    except Exception as error:  # unpickling and torch raise whatever the bytes lead to
        if out_of_memory(error):
            raise
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"checkpoint {file} does not fit this run or is damaged: {shown(f'{type(error).__name__}: {error}')}"
    )
