"""What is read from files that others may have made: its kinds and bounds, and how it is shown. No torch here.

A file is described by kinds, `Section({"steps": Whole(1, 10_000)})`, and `check` refuses whatever is of another kind
with one message: the file, the key, what was found, what was expected. Content is never trusted to be short or
printable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from suite.errors import ConfigError
from suite.printable import printable
from suite.suggest import nearest

DEPTH = 64
"""How deep lists and objects may lie in each other."""
SHOWN = 80
"""Most characters of a value in a message."""
MAX_SEED = 2**63 - 1

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def message(text: str) -> str:
    """One line: what a command prints of an error or a warning."""
    return printable(" ".join(part.strip() for part in text.splitlines() if part.strip()))


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, escaped and cut."""
    if isinstance(value, str):
        text = repr(value[: 2 * SHOWN])
    elif isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of some {len(bin(abs(value))) * 30103 // 100000} digits"
    elif value is None or isinstance(value, bool | list | tuple | dict):
        try:
            text = json.dumps(
                value if not isinstance(value, list | tuple | dict) or len(value) <= SHOWN else list(value)[:SHOWN]
            )
        except (ValueError, TypeError, RecursionError):
            text = f"a {type(value).__name__}"
    else:
        text = repr(value)
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def parse_json(text: str | bytes, where: str) -> Any:
    """The content of a JSON text whose numbers are finite and which is not nested deeper than `DEPTH`.

    Raises:
        ConfigError: it is not.
    """

    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {shown(str(error))[1:-1]}") from error
    return check_depth(content, where)


def check_depth(content: Any, where: str) -> Any:
    """`content`, if it is not nested deeper than `DEPTH`.

    Raises:
        ConfigError: it is.
    """
    level, depth = [content], 0
    while level := [v for item in level for v in _inside(item)]:
        depth += 1
        if depth > DEPTH:
            raise ConfigError(f"{where} is nested deeper than {DEPTH}")
    return content


def check_plain(content: Any, where: str) -> Any:
    """`content`, if its numbers are finite and it is not nested deeper than `DEPTH`.

    Raises:
        ConfigError: they are not, or it is.
    """
    check_depth(content, where)
    if odd := next((v for v in scalars(content) if isinstance(v, float) and not math.isfinite(v)), None):
        raise ConfigError(f"{where} holds {odd}, which is not a finite number")
    return content


def scalars(content: Any) -> Iterator[Any]:
    """Everything in plain data that is neither a list nor an object."""
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, dict | list):
            left.extend(item.values() if isinstance(item, dict) else item)
        else:
            yield item


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _inside(item: Any) -> list[Any]:
    """The values of a list or an object that are lists or objects themselves."""
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [v for v in values if isinstance(v, dict | list)]


@dataclass(frozen=True)
class Kind:
    """What a value may be; one of the classes below."""


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number within bounds."""

    low: int = 0
    high: int = MAX_SEED


@dataclass(frozen=True)
class Number(Kind):
    """A finite number within bounds."""

    low: float = -1e30
    high: float = 1e30


@dataclass(frozen=True)
class Text(Kind):
    """A text of at most `most` characters, of the form `pattern` (called `says` in messages) if there is one."""

    most: int = 1000
    pattern: str = ""
    says: str = ""


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""


@dataclass(frozen=True)
class OneOf(Kind):
    """One of these values."""

    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Items(Kind):
    """A list of `least` to `most` of one kind."""

    kind: Kind
    least: int = 0
    most: int = 10_000


@dataclass(frozen=True)
class Table(Kind):
    """An object of at most `most` values of one kind under any names."""

    kind: Kind
    most: int = 1000


@dataclass(frozen=True)
class Section(Kind):
    """An object with these keys; `optional` ones may be missing or null, and further ones are left alone."""

    keys: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)


@dataclass(frozen=True)
class Anything(Kind):
    """Whatever JSON can hold."""


NAME = Text(100, _NAME, "a name of letters, digits, `.`, `_` and `-`")
"""A name that can stand in a file name and leads nowhere else."""


def check(content: Any, kind: Kind, where: str) -> Any:
    """`content`, if it is of this kind.

    Raises:
        ConfigError: `where`, the key, what was found and what was expected.
    """
    if fault := _fault(content, kind, ""):
        raise ConfigError(f"{where}{fault}")
    return content


def _fault(value: Any, kind: Kind, key: str) -> str:
    """What is wrong, as `: key is FOUND, expected KIND`; empty if nothing is."""
    match kind:
        case Section(keys, optional) if isinstance(value, Mapping):
            for name in keys:
                if name not in value:
                    near = nearest(
                        name, [k for k in value if isinstance(k, str) and len(k) <= 100 and k not in optional]
                    )
                    return f" says nothing about {_join(key, name)!r}{printable(near)}"
            inside = [*keys.items(), *((n, k) for n, k in optional.items() if value.get(n) is not None)]
            return next((f for n, k in inside if (f := _fault(value[n], k, _join(key, n)))), "")
        case Table(inner, most) if isinstance(value, Mapping) and len(value) <= most:
            for name, item in value.items():
                if not isinstance(name, str) or len(name) > 200:
                    return f": {key or 'it'} has the key {shown(name)}, expected a short text"
                if fault := _fault(item, inner, _join(key, shown(name)[1:-1])):
                    return fault
            return ""
        case Items(inner, least, most) if isinstance(value, list | tuple) and least <= len(value) <= most:
            return next((f for i, item in enumerate(value) if (f := _fault(item, inner, f"{key}[{i}]"))), "")
        case Whole(low, high) if type(value) is int and low <= value <= high:
            return ""
        case Number(low, high) if _is_number(value) and low <= value <= high and math.isfinite(value):
            return ""
        case Text(most, pattern) if isinstance(value, str) and len(value) <= most:
            if not pattern or re.fullmatch(pattern, value):
                return ""
        case Flag() if isinstance(value, bool):
            return ""
        case OneOf(choices) if any(type(value) is type(c) and value == c for c in choices):
            return ""
        case Anything():
            return ""
    return f": {key or 'it'} is {shown(value)}, expected {expected(kind)}"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def expected(kind: Kind) -> str:
    """A kind in words."""
    match kind:
        case Whole(low, high):
            return f"a whole number from {low} to {'2**63 - 1' if high == MAX_SEED else high}"
        case Number(low, high):
            return "a finite number" + (f" from {low:g} to {high:g}" if (low, high) != (-1e30, 1e30) else "")
        case Text(most, _, says):
            return says or f"a text of at most {most} characters"
        case Flag():
            return "true or false"
        case OneOf(choices):
            return "one of " + ", ".join(map(str, choices))
        case Items(inner, least, most):
            count = str(least) if least == most else f"{least} to {most}"
            return f"a list of {count} values, each {expected(inner)}"
        case Table(inner, most):
            return f"an object of at most {most} values, each {expected(inner)}"
        case Section(keys):
            return "an object" + (f" with {', '.join(keys)}" if keys else "")
    return "any value"
