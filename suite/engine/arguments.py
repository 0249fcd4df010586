"""What a caller in Python may hand over as prompts, seeds and numbers, and what it becomes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from suite.errors import ConfigError
from suite.host.prompts import MAX_SEED, check


def whole(value: Any, name: str, low: int, high: int | None = None) -> int:
    """A whole number of any library's type (numpy's, a tensor of one element), but no truth value.

    Raises:
        ConfigError: it is something else, or out of range.
    """
    expected = f"expected a whole number from {low}" + ("" if high is None else f" to {high}")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} = {_shown(value)}: {expected}") from error
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name} = {_shown(value)}: {expected}")
    return number


def prompts_of(value: Any) -> list[str]:
    """One text, or several from any iterable.

    Raises:
        ConfigError: none, or one that is no text or is blank.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"prompt = {_shown(value)}: expected a text, or a list of texts")
    out = list(value)
    for index, prompt in enumerate(out):
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt {index} = {_shown(prompt)}: expected a text, got {type(prompt).__name__}")
    check(out)
    return [str(prompt) for prompt in out]


def seeds_of(value: Any, count: int) -> list[int]:
    """A seed for each of `count` prompts.

    Raises:
        ConfigError: not as many, or one that no generator takes.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"seeds = {_shown(value)}: expected a list of {count} whole numbers, one a prompt")
    out = [whole(seed, f"seeds[{index}]", 0, MAX_SEED) for index, seed in enumerate(value)]
    if len(out) != count:
        raise ConfigError(f"{len(out)} seeds for {count} prompts; give one seed a prompt")
    return out


def text(value: Any, name: str) -> str:
    """A text.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} = {_shown(value)}: expected a text, got {type(value).__name__}")
    return value


def _shown(value: Any) -> str:
    """What was given, cut: it may be a tensor or a whole file."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
