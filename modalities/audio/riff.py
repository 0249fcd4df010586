"""A comment in a WAV file: the chunk LIST INFO ICMT that players show, of any length (libsndfile cuts long ones)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from suite.errors import ConfigError


def add_comment(path: Path, text: str) -> None:
    """Append `text` to a WAV file as its comment."""
    content = text.encode() + b"\0"
    entry = b"ICMT" + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    listing = b"INFO" + entry
    with open(path, "r+b") as stream:
        head = stream.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise ConfigError(f"{path} is not a WAV file")
        end = stream.seek(0, 2)
        padding = b"\0" * (end % 2)
        stream.write(padding + b"LIST" + struct.pack("<I", len(listing)) + listing)
        stream.seek(4)
        stream.write(struct.pack("<I", end + len(padding) + 8 + len(listing) - 8))


def read_comment(path: Path) -> str | None:
    """The comment of a WAV file, or None without one. Raises ConfigError when the file is damaged."""
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ConfigError(f"{path} is not a WAV file, whatever its ending says")
    for name, body in _chunks(data[12:]):
        if name == b"LIST" and body[:4] == b"INFO":
            for entry, value in _chunks(body[4:]):
                if entry == b"ICMT":
                    return value.rstrip(b"\0").decode("utf-8", "replace")
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        yield name, data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
