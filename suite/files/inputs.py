"""Files that a command reads: regular ones only, of bounded size, and one message for whatever is wrong with one.

A pipe or a device would be waited for without end, and a file of any size would be taken into memory.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.files.untrusted import check_plain, parse_json

MIB = 2**20
YAML = MIB
"""Most bytes of a file that people write: a recipe, a training file."""
TEXT = 64 * MIB
"""Most bytes of a text or a JSON file."""
MEDIA = 1024 * MIB
"""Most bytes of a picture, a clip, a sound."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe; write its content into a file first",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_file(path: Path | str) -> bool:
    """Whether there is a regular file; a name that no file can have is none, where `Path.is_file` raises."""
    return os.path.isfile(path)


def check(path: Path, what: str, limit: int | None = None) -> None:
    """Refuse what is not a regular file of at most `limit` bytes; for files that a library opens by itself.

    Raises:
        ConfigError: `what` and the path, and what is wrong.
    """
    try:
        _refuse(os.stat(path), path, what, limit)
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, error) from error


def read_bytes(path: Path, what: str, limit: int = MEDIA) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        ConfigError: as `check`.
    """
    try:
        # Without waiting for a writer: what is open is asked, so that nothing can be put in its place in between.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _refuse(os.fstat(descriptor), path, what, limit)
            with open(descriptor, "rb", closefd=False) as stream:
                content = stream.read(limit + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, error) from error
    if len(content) > limit:  # it grew, or is one of those of /proc, which say that they are empty
        raise _too_large(path, what, limit)
    return content


def read_text(path: Path, what: str, limit: int = TEXT) -> str:
    """The content of a UTF-8 file, without its byte order mark.

    Raises:
        ConfigError: as `check`, or it is not UTF-8.
    """
    try:
        text = read_bytes(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, what: str, limit: int = TEXT) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: as `check`, or it is not JSON, holds numbers that are not finite, or is nested too deeply.
    """
    return parse_json(read_text(path, what, limit), f"{what} {path}")


def read_yaml(path: Path, what: str, limit: int = YAML) -> Any:
    """The content of a YAML file. Aliases are refused: a few lines of them stand for gigabytes.

    Raises:
        ConfigError: as `check`, or it is not YAML, or nested too deeply.
    """
    import yaml

    text = read_text(path, what, limit)
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(f"{what} {path} has an alias, like *name; write out what it stands for")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from error
    return check_plain(content, f"{what} {path}")


def _refuse(found: os.stat_result, path: Path, what: str, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise ConfigError(f"{what} {path} is not a regular file but {kind}")
    if limit is not None and found.st_size > limit:
        raise _too_large(path, what, limit)


def _too_large(path: Path, what: str, limit: int) -> ConfigError:
    return ConfigError(f"{what} {path} is larger than {limit // MIB} MiB, the most that is read")


def _unreadable(path: Path, what: str, error: Exception) -> ConfigError:
    return ConfigError(f"{what} {_short(path)} cannot be read: {getattr(error, 'strerror', None) or error}")


def _short(path: Path) -> str:
    text = repr(str(path))[1:-1]  # a name that no file can have may hold anything
    return text if len(text) <= 300 else f"{text[:280]}... ({len(text)} characters)"
