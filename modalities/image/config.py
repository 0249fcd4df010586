"""What a training file says about an image model, read from YAML and checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from suite.errors import ConfigError
from suite.modalities.shared.training import TrainOptions


@dataclass(frozen=True)
class ImageTraining:
    """One training recipe.

    `network` chooses the class and `model` gives its arguments as diffusers names them. Times are
    sigmoid(N(`time_mean`, `time_std`)); the loss weight is 1 / max(t, `time_floor`)^2. `styles` are shares of the
    draws. `immiscible` pairs noise with pictures inside a batch. `sheet` lists captions of the data to draw;
    `defaults` is what the model proposes to the engine.
    """

    name: str
    network: Literal["transformer", "unet"]
    model: Mapping[str, Any]
    shape: tuple[int, int, int]
    batch: int = 64
    text_length: int = 24
    caption_dropout: float = 0.1
    time_mean: float = 0.6
    time_std: float = 1.0
    time_floor: float = 0.1
    immiscible: bool = False
    styles: Mapping[str, float] = field(default_factory=lambda: {"3d": 1.0})
    sheet: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"guidance": 3.0})
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "sheet", tuple(self.sheet))
        if self.network not in ("transformer", "unet"):
            raise ConfigError(f"network is {self.network!r}, expected transformer or unet")
        if len(self.shape) != 3 or self.shape[0] != 3 or self.shape[1] != self.shape[2]:
            raise ConfigError(f"shape is {list(self.shape)}, expected [3, size, size]")
        if self.batch < 1 or not 0 <= self.caption_dropout < 1 or self.time_floor <= 0:
            raise ConfigError("batch must be 1 or more, caption_dropout in [0, 1), and time_floor above 0")
        if not self.styles or min(self.styles.values()) < 0 or sum(self.styles.values()) <= 0:
            raise ConfigError(f"styles is {dict(self.styles)}, expected shares such as {{3d: 0.9, flat: 0.1}}")


def read(path: Path | str, overrides: Sequence[str] = ()) -> ImageTraining:
    """The recipe in a YAML file, with `overrides` such as `train.lr=1e-3` laid over it.

    Raises ConfigError that names the file and the key for anything unknown, missing or of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no training file {path}: see configs/training/ for those that come with the suite")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected keys and values")
    for text in overrides:
        _override(tree, text)
    options = tree.pop("train", {})
    _check_keys(path, "train.", options, TrainOptions)
    _check_keys(path, "", tree, ImageTraining)
    try:
        return ImageTraining(**tree, train=TrainOptions(**options))
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"Override {text!r} is not of the form key=value, such as train.lr=1e-3")
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"Override {text!r}: {part} is a single value, it has no parts")
    tree[last] = _number(yaml.safe_load(value))


def _number(value: Any) -> Any:
    """YAML 1.1 takes `1e-3` for text, for want of a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_keys(path: Path, prefix: str, values: Any, kind: type) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {prefix.rstrip('.')} holds {type(values).__name__}, expected keys and values")
    known = {f.name: str(f.type) for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key {prefix}{key}; {hint}")
        values[key] = value = _number(value) if known[key] in ("float", "int") else value
        if known[key] == "int" and isinstance(value, float) and value.is_integer():
            values[key] = value = int(value)
        allowed = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(known[key], object)
        if not isinstance(value, allowed) or (isinstance(value, bool) and known[key] in ("int", "float")):
            raise ConfigError(f"{path}: {prefix}{key} is {value!r}, expected {known[key]}")
