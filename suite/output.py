"""Writing results: checked before any heavy work, written to a temporary name, renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suite.errors import ConfigError, OutputError

RECORD = "metadata.json"
"""The record in a result that is a folder."""


def targets(output: Path, count: int, suffixes: Sequence[str], joins: Sequence[str] = ()) -> list[Path]:
    """The files that `count` results go to.

    One result goes to `output`; several to `output` with -000, -001, ... before its ending, or all to `output` if
    its ending is one of `joins`. A folder takes numbered files of the default ending.

    Raises:
        ConfigError: the folder does not exist or cannot be written, or the ending is not one that can be saved.
    """
    if output.is_dir() and not (output.suffix.lower() in suffixes and _is_result(output)):
        files = [output / f"{i:03d}{suffixes[0]}" for i in range(count)]
    else:
        if output.suffix.lower() not in suffixes:
            raise ConfigError(
                f"-o {output}: cannot write {output.suffix or 'a file without ending'}; "
                f"expected {', '.join(suffixes)}, or an existing folder"
            )
        files = (
            [output] * count
            if count == 1 or output.suffix.lower() in joins
            else [output.with_name(f"{output.stem}-{i:03d}{output.suffix}") for i in range(count)]
        )
    check_folder(files[0].parent)
    return files


def _is_result(path: Path) -> bool:
    """Whether a path is a folder that is a result by itself: frames of a clip, with their record."""
    return (path / RECORD).is_file()


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not exist or cannot be written.

    Raises:
        ConfigError: it names the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder; results cannot be written into it")
    if not folder.is_dir():
        raise ConfigError(f"the folder {folder} does not exist; make it with `mkdir -p {folder}`")
    try:  # permission bits say little for root and for network file systems; trying says all
        descriptor, probe = tempfile.mkstemp(prefix=".suite-", dir=folder)
        os.close(descriptor)
        os.unlink(probe)
    except OSError as error:
        raise ConfigError(f"cannot write into the folder {folder}: {error.strerror}") from error


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it on success, removed on any failure.

    What is written there may be a folder (frames of a clip); it then takes the place of an older folder.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir() and _is_result(path):
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}; nothing half-written is left"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write(path: Path, save: Callable[[Path], None], join: bool = False) -> None:
    """Write one file through `save(temporary path)`; with `join` after what `path` holds already."""
    with atomically(path) as temporary:
        save(temporary)
        if join:
            temporary.write_bytes(path.read_bytes() + temporary.read_bytes())
