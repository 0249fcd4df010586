"""Text that may come from anywhere, as it may go to a terminal: no control characters, no more than anyone reads."""

from __future__ import annotations

from typing import Any

MESSAGE = 2000
"""Most bytes of one message."""


def printable(text: str, limit: int = MESSAGE) -> str:
    """The text on its lines with everything unprintable escaped, and its middle left out if it is long.

    Escapes that a file brings would act on the terminal that shows them. At most `limit` bytes of UTF-8.
    """
    out = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    content = out.encode()
    if len(content) <= limit:
        return out
    gap = f" ... ({len(content)} bytes) ... "
    room = limit - len(gap)
    begin, end = content[: room * 2 // 3], content[len(content) - room // 3 :]
    return begin.decode(errors="ignore") + gap + end.decode(errors="ignore")


def short(value: Any, limit: int = 40) -> str:
    """A value in one line of a message: as Python writes it, or its beginning and its length."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 10]}... ({len(text)} characters)"
