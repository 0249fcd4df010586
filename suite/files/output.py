"""Writing results: named and checked before any heavy work, written to a temporary place, renamed into place."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suite.errors import ConfigError, OutputError, TakenError
from suite.files import temporary
from suite.files.inputs import read_json

RECORD = "metadata.json"
"""The record in a result that is a folder."""


def targets(
    output: Path,
    count: int,
    suffixes: Sequence[str],
    joins: Sequence[str] = (),
    beside: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """The files that `count` results go to.

    One result goes to `output`; several to `output` with -000, -001, ... before its ending, or all to `output` if
    its ending is one of `joins`. A folder takes numbered files of the default ending. Numbers go on after the highest
    one that is there.

    Args:
        beside: what is appended to a result's name for the files beside it.
        overwrite: numbers begin at 000, and what has these names is replaced.

    Raises:
        ConfigError: the folder does not exist or cannot be written, the ending is not one that can be saved, the name
            is too long, or a file beside the result is another's.
    """
    if is_folder(output, suffixes):
        first = 0 if overwrite else next_number(output, "")
        files = [output / f"{first + i:03d}{suffixes[0]}" for i in range(count)]
    else:
        if output.suffix.lower() not in suffixes:
            raise ConfigError(
                f"-o {_short(output)}: cannot write {_short(output.suffix) or 'a file without ending'}; "
                f"expected {', '.join(suffixes)}, or an existing folder"
            )
        check_folder(output.parent)
        if count == 1 or output.suffix.lower() in joins:
            files = [output] * count
        else:
            first = 0 if overwrite else next_number(output.parent, f"{output.stem}-")
            files = [output.with_name(f"{output.stem}-{first + i:03d}{output.suffix}") for i in range(count)]
    check_folder(files[0].parent)
    check_names(files, () if output.suffix.lower() in joins else beside, overwrite)
    return files


def place(text: str) -> Path:
    """A path as people type it: one that ends in a slash is a folder, and has to be there.

    Raises:
        ConfigError: it is not.
    """
    if text.endswith(os.sep) and not os.path.isdir(text):
        raise ConfigError(f"-o {_short(text)}: there is no such folder; make it with `mkdir -p {_short(text)}`")
    return Path(text)


def is_folder(output: Path, suffixes: Sequence[str]) -> bool:
    """Whether `output` is a folder to write into, and not one that is a result by itself."""
    return os.path.isdir(output) and not (output.suffix.lower() in suffixes and _is_result(output))


def _is_result(path: Path) -> bool:
    """Whether a path is a folder that is a result by itself: frames of a clip, with their record."""
    return os.path.isfile(path / RECORD)


def next_number(folder: Path, stem: str) -> int:
    """One more than the highest number after `stem` in the names of a folder, whatever their endings; 0 if none."""
    form = re.compile(rf"{re.escape(stem)}(\d{{3,9}})(\..*)?", re.DOTALL)
    return max((int(m[1]) + 1 for name in os.listdir(folder) if (m := form.fullmatch(name))), default=0)


def taken(file: Path, beside: Sequence[str] = ()) -> bool:
    """Whether a result of this name would meet another file, also with what lies beside it."""
    return any(os.path.lexists(path) for path in (file, *(file.with_name(file.name + end) for end in beside)))


def free(file: Path, beside: Sequence[str] = ()) -> Path:
    """This name, or if it is taken with the next number after it."""
    if not taken(file, beside):
        return file
    return file.with_name(f"{file.stem}-{max(1, next_number(file.parent, f'{file.stem}-')):03d}{file.suffix}")


def another(file: Path) -> Path:
    """The next free name like this one: its number one more than the highest, or a number if it has none."""
    found = re.fullmatch(r"(.*?)(\d{3,9})", file.stem, re.DOTALL)
    stem = found[1] if found else f"{file.stem}-"
    number = max(next_number(file.parent, stem), 0 if found else 1)
    return file.with_name(f"{stem}{number:03d}{file.suffix}")


def check_names(files: Sequence[Path], beside: Sequence[str] = (), overwrite: bool = False) -> None:
    """Refuse names that the file system does not take, and files beside a result that are not a result's.

    Raises:
        ConfigError: it names the file, and what to type.
    """
    longest = max(beside, key=len, default="")
    for file in dict.fromkeys(files):
        most = _name_max(file.parent)
        if (length := len(os.fsencode(file.name + longest))) > most:
            with_it = f" with the {longest} beside it" if longest else ""
            raise ConfigError(
                f"{_short(file)}: the name is {length} bytes long{with_it}, and the file system takes {most}; "
                "give a shorter one"
            )
        for end in () if overwrite or os.path.lexists(file) else beside:
            if os.path.lexists(other := file.with_name(file.name + end)):
                raise ConfigError(
                    f"{other} exists and belongs to no {file.name}; it would be replaced: add --overwrite, or take "
                    "another -o"
                )


def check_report(file: Path, overwrite: bool) -> None:
    """Refuse a report that would replace anything else than an earlier report.

    Raises:
        ConfigError: it names the file.
    """
    if os.path.isdir(file):
        raise ConfigError(f"--report {file} is a folder; expected a file")
    check_names([file])
    if overwrite or not os.path.lexists(file):
        return
    try:
        content = read_json(file, "report")
    except ConfigError:
        content = None
    if not isinstance(content, dict) or not {"files", "reports"} <= content.keys():
        raise ConfigError(f"--report {file} exists and is no report; give another name, or add --overwrite")


def _name_max(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not exist or cannot be written.

    Raises:
        ConfigError: it names the folder.
    """
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise ConfigError(f"{folder} is a file, not a folder; results cannot be written into it")
        raise ConfigError(f"the folder {_short(folder)} does not exist; make it with `mkdir -p {_short(folder)}`")
    try:  # permission bits say little for root and for network file systems; trying says all
        with temporary.place(folder):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write into the folder {folder}: {error.strerror}") from error


@contextmanager
def atomically(path: Path, fresh: bool = False) -> Iterator[Path]:
    """A temporary path; flushed to the disk and renamed to `path` on success, removed on any failure.

    What is written there may be a folder (frames of a clip); it then takes the place of an older folder.

    Args:
        fresh: do not replace what has this name.

    Raises:
        OutputError: the disk is full or the file cannot be written.
        TakenError: `fresh`, and the name is taken.
    """
    with writing(path), temporary.place(path.parent) as folder:
        made = folder / f"new{path.suffix}"
        yield made
        temporary.flush(made)
        if made.is_dir() and _is_result(path) and not fresh:
            os.rename(path, folder / "old")  # aside in one go: half of it must never be seen
        _move(made, path, fresh)
        temporary.flush_name(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever a full disk makes a library raise becomes an OutputError that names `path`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if (why := cause(error)) is None:
            raise
        raise OutputError(f"{path} could not be written: {why}; nothing half-written is left") from error


def _move(made: Path, path: Path, fresh: bool) -> None:
    if not fresh:
        os.replace(made, path)
        return
    try:
        if not made.is_dir():
            os.link(made, path)  # unlike a rename, it never replaces
            return
    except FileExistsError as error:
        raise TakenError(f"{path} exists meanwhile") from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise  # the others are file systems without links
    if os.path.lexists(path):
        raise TakenError(f"{path} exists meanwhile")
    os.rename(made, path)


def cause(error: Exception) -> str | None:
    """Why a file could not be written, if that is what an error says; libraries raise errors of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).strip()
    safetensors = type(error).__name__ == "SafetensorError" and ("I/O error" in text or "IoError" in text)
    torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    return text.splitlines()[0][:300] if text and (safetensors or torch) else None


def write(path: Path, save: Callable[[Path], object], join: bool = False, fresh: bool = False) -> None:
    """Write one file through `save(temporary path)`; with `join` after what `path` holds already.

    Raises:
        OutputError, TakenError: see `atomically`.
    """
    with atomically(path, fresh and not join) as made:
        save(made)
        if join:
            made.write_bytes(path.read_bytes() + made.read_bytes())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file.

    Raises:
        OutputError: see `atomically`.
    """
    write(path, lambda made: made.write_text(text, encoding="utf-8"))


def _short(path: Path | str) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:280]}... ({len(text)} characters)"
