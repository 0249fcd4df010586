"""Read a training file: YAML into a frozen dataclass with a field `train`, checked key by key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from suite.errors import ConfigError
from suite.files.inputs import is_file, read_yaml
from suite.training.loop import TrainOptions

T = TypeVar("T")


def read_training(kind: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """The recipe `kind` in a YAML file, with `overrides` such as `train.lr=1e-3` laid over it.

    Raises ConfigError that names the file and the key for anything unknown, missing or of the wrong kind.
    """
    path = Path(path)
    tree = tree_of(path)
    tree.pop("stages", None)  # `stages.in_stages` turns them into overrides
    for text in overrides:
        _override(tree, text)
    options = tree.pop("train", {})
    _check_keys(path, "train.", options, TrainOptions)
    _check_keys(path, "", tree, kind)
    try:
        return kind(**{**tree, "train": TrainOptions(**options)})
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def tree_of(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError when it is missing or holds anything else."""
    if not is_file(path):
        raise ConfigError(f"There is no training file {path}: see configs/training/ for those that come with the suite")
    tree = read_yaml(path, "training file")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected keys and values")
    return tree


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
    known = {f.name: str(f.type) for f in fields(kind)}  # pyright: ignore[reportArgumentType]
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
