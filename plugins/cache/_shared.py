"""What the caches of block outputs have in common: counting bytes."""

from __future__ import annotations

from typing import Any


def size(value: Any) -> int:
    """Bytes of the tensors in an output: a tensor, None, or a tuple or list of outputs."""
    if isinstance(value, tuple | list):
        return sum(size(v) for v in value)
    return 0 if value is None else value.nbytes


def held_within(*roots: Any) -> int:
    """Bytes of all tensors in another library's state: in dictionaries, sequences and attributes, each memory once."""
    seen: set[int] = set()
    memory: dict[int, int] = {}
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or value is None or isinstance(value, str | bytes | int | float | type):
            continue
        seen.add(id(value))
        if hasattr(value, "untyped_storage"):
            memory[value.untyped_storage().data_ptr()] = size(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, tuple | list | set):
            waiting.extend(value)
        elif not callable(value):  # modules and functions are not its state
            waiting.extend(vars(value).values() if hasattr(value, "__dict__") else ())
    return sum(memory.values())
