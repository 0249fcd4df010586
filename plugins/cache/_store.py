"""A folder of states that outlives a run: bounded, safe under several processes, and never believed when damaged.

    FOLDER/index.json           what each entry saves, how often it was used, its bytes; replaced as a whole
    FOLDER/STAMP/NAME.safetensors    one entry: `vector` to find it by, `state`, and what else belongs to it

A stamp says what an entry is good for (weights, recipe, grid, shape), so another model's entries are never seen. Every
entry carries the sha256 of its tensors. All changes are made under one lock, and files are renamed into place.

Others may write into the folder too. So only regular files directly in its sub-folders are entries, by names that lead
nowhere else; whatever the index says, nothing else is read, replaced or deleted.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.files import temporary, untrusted
from suite.files.inputs import read_json
from suite.files.output import write, write_text
from suite.files.untrusted import Section, Table, Text, Whole, shown

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "suite-store/1"
INDEX = "index.json"
SUFFIX = ".safetensors"
WAIT = 30.0
"""Seconds to wait for another process's lock."""
MIB = 2**20
ENTRY = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}"
"""A stamp, and a name without its ending: they begin with no dot, so temporary files are none."""
ROWS = Table(Section(dict.fromkeys(("saves", "uses", "bytes", "made"), Whole(0, 2**50))), 10**6)
"""The entries of an index."""


@cache
def of_this_process() -> Path:
    """The folder that is used when none is named; it is removed when the process ends."""
    held = contextlib.ExitStack()
    atexit.register(held.close)
    return held.enter_context(temporary.place(Path(tempfile.gettempdir())))


@dataclass(frozen=True)
class Store:
    """One folder.

    Attributes:
        name: of the plugin, for messages.
        limit: most bytes of all entries.
    """

    name: str
    folder: Path
    limit: int
    _vectors: dict[Path, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(name: str, folder: str, limit_mib: float) -> Store:
        """The store in `folder`, made if it is missing; of this process alone if `folder` is empty.

        Raises:
            ConfigError: it cannot be used, or its index is of another kind.
        """
        place = Path(folder).expanduser() if folder else of_this_process()
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe = tempfile.TemporaryFile(dir=place)
            probe.close()
        except OSError as error:
            raise ConfigError(
                f"{name}: store = {str(place)!r} cannot be used: {error.strerror or error}; name a folder that can be "
                "written"
            ) from error
        store = Store(name, place, int(limit_mib * MIB))
        with store._unwritable(), store._locked():
            store._index()
        return store

    # ---- reading -----------------------------------------------------------------------------------

    def vectors(self, stamp: str, width: int | None = None, pattern: str = ENTRY) -> tuple[list[str], Tensor]:
        """Names of all entries with this stamp, and their vectors [n, D] float32, which `take` still has to verify.

        Args:
            width: D; an entry with another is dropped.
            pattern: of the names; files of other names are left alone.
        """
        import torch

        names, rows = [], []
        for path in entries(self.folder, stamp):
            if not re.fullmatch(pattern, path.name.removesuffix(SUFFIX)):
                continue
            if path not in self._vectors:
                tensors = self._read(path, only="vector")
                if tensors is not None:
                    vector = tensors["vector"]
                    width = vector.numel() if width is None else width
                    if unfit := _unfit("vector", vector, torch.zeros(width)):
                        self._warn(path, unfit)
                        tensors = None
                if tensors is None:
                    self.drop(stamp, path.name.removesuffix(SUFFIX))
                    continue
                self._vectors[path] = tensors["vector"]
            names.append(path.name.removesuffix(SUFFIX))
            rows.append(self._vectors[path])
        return names, torch.stack(rows) if rows else torch.zeros(0, 0)

    def take(self, stamp: str, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """An entry that is whole, counted as used; None (and gone, with a warning) if it is damaged.

        Args:
            like: what it must hold: tensors of these names, shapes and types, finite.
        """
        path = self.folder / stamp / f"{name}{SUFFIX}"
        tensors = self._read(path)
        if tensors is not None and like is not None:
            unfit = "" if tensors.keys() == like.keys() else f"it holds {', '.join(sorted(tensors)) or 'nothing'}"
            unfit = unfit or next((u for key in like if (u := _unfit(key, tensors[key], like[key]))), "")
            if unfit:
                self._warn(path, unfit)
                tensors = None
        with self._unwritable(), self._locked():
            index = self._index()
            row = index.get(f"{stamp}/{name}")
            if tensors is not None and row is not None:
                row["uses"] += 1
                self._write(index)
        if tensors is None:
            self.drop(stamp, name)
        return tensors

    def drop(self, stamp: str, name: str) -> None:
        """Delete an entry."""
        with self._unwritable(), self._locked():
            index = self._index()
            self._delete(f"{stamp}/{name}")
            index.pop(f"{stamp}/{name}", None)
            self._write(index)

    def _delete(self, key: str) -> None:
        """Unlink the file of an entry, which must be a regular one directly in a sub-folder of the store."""
        path = self.folder / f"{key}{SUFFIX}"
        self._vectors.pop(path, None)
        if _is_key(key) and is_entry(path):
            path.unlink(missing_ok=True)

    def _warn(self, path: Path, why: str) -> None:
        warnings.warn(f"{self.name}: {path} is damaged and was dropped: {why}", stacklevel=3)

    def _read(self, path: Path, only: str = "") -> dict[str, Tensor] | None:
        """The tensors of a file, or one of them, unverified; None if it cannot be read, or is not what was written."""
        from safetensors import SafetensorError, safe_open

        if not is_entry(path):  # another process evicted it, or it is a link, which is not followed
            return None
        try:
            with safe_open(path, "pt") as box:
                if only:
                    return {only: box.get_tensor(only)}
                tensors = {name: box.get_tensor(name) for name in box.keys()}
                said = box.metadata() or {}
        except FileNotFoundError:  # another process evicted it
            return None
        except (SafetensorError, OSError) as error:
            self._warn(path, shown(str(error))[1:-1])
            return None
        if said != _marks(path, tensors):
            self._warn(path, "its content has changed")
            return None
        return tensors

    # ---- writing -----------------------------------------------------------------------------------

    def put(self, stamp: str, name: str, saves: int, tensors: Mapping[str, Tensor]) -> bool:
        """Keep an entry that saves so many steps, and drop what is worth least; False if nothing was written."""
        from safetensors.torch import save_file

        path = self.folder / stamp / f"{name}{SUFFIX}"
        with self._unwritable(), self._locked():
            index = self._index()
            key = f"{stamp}/{name}"
            if key in index and is_entry(path):
                return False
            if os.path.lexists(path.parent) and not stat.S_ISDIR(os.lstat(path.parent).st_mode):
                warnings.warn(f"{self.name}: {path.parent} is no folder, so nothing is stored there", stacklevel=2)
                return False
            path.parent.mkdir(exist_ok=True)
            kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            write(path, lambda made: save_file(kept, made, _marks(path, kept)))
            made = 1 + max((row["made"] for row in index.values()), default=0)
            index[key] = {"saves": saves, "uses": 1, "bytes": path.stat().st_size, "made": made}
            for worst in evicted(index, self.limit):
                self._delete(worst)
                del index[worst]
            self._write(index)
            return True
        return False

    def held(self) -> int:
        """Bytes of all entries."""
        with self._unwritable(), self._locked():
            return sum(row["bytes"] for row in self._index().values())
        return 0

    def in_memory(self) -> int:
        """Bytes of the vectors that are kept for searching."""
        return sum(vector.numel() * vector.element_size() for vector in self._vectors.values())

    def forget(self) -> None:
        """Keep nothing in memory; the folder stays."""
        self._vectors.clear()

    # ---- the index, under the lock -----------------------------------------------------------------

    @contextlib.contextmanager
    def _unwritable(self) -> Iterator[None]:
        """A full disk costs what the store would have saved later, not the result of this run."""
        try:
            yield
        except OSError as error:
            what = f"{self.name}: the store {self.folder} could not be written; the result is not affected: {error}"
            warnings.warn(what, stacklevel=4)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = self.folder / ".lock"
        if os.path.lexists(lock) and not stat.S_ISREG(os.lstat(lock).st_mode):
            raise ConfigError(f"{self.name}: {lock} is no regular file; delete it, or name another folder")
        try:
            with FileLock(lock, timeout=WAIT):
                yield
        except Timeout as error:
            raise ConfigError(
                f"{self.name}: another process has held the lock of the store {self.folder} for {WAIT:g} s; end it, or "
                "name another folder"
            ) from error

    def _index(self) -> dict[str, dict[str, int]]:
        file, damage = self.folder / INDEX, ""
        if os.path.lexists(file):
            try:
                content = read_json(file, "index")
            except ConfigError as error:
                content, damage = None, str(error)
            said = content.get("format") if isinstance(content, Mapping) else None
            if said not in (None, FORMAT):  # not damaged, but another version's or another program's
                raise ConfigError(
                    f"{self.name}: the store {self.folder} is of format {shown(said)}, expected {FORMAT!r}; name "
                    "another folder, or delete it"
                )
            try:
                whole = untrusted.check(content, Section({"format": Text(), "entries": ROWS}), str(file))
                if all(map(_is_key, whole["entries"])):
                    return whole["entries"]
                damage = "an entry names no file of the store"
            except ConfigError as error:
                damage = damage or str(error)
            damage = f"{self.name}: {file} is damaged and was made anew; counts of uses are lost: {damage}"
        files = entries(self.folder)
        if damage:
            warnings.warn(damage, stacklevel=2)
        elif any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise ConfigError(
                f"{self.name}: {self.folder} is not empty and holds no {INDEX}, so it is not a store; "
                "name another folder"
            )
        made = {
            f"{f.parent.name}/{f.name.removesuffix(SUFFIX)}": {
                "saves": 1,
                "uses": 1,
                "bytes": f.stat().st_size,
                "made": k,
            }
            for k, f in enumerate(files)
        }
        self._write(made)
        return made

    def _write(self, index: Mapping[str, Any]) -> None:
        write_text(self.folder / INDEX, json.dumps({"format": FORMAT, "entries": index}, indent=0))


def entries(folder: Path, stamp: str = "*") -> list[Path]:
    """The files of all entries, or of those with a stamp: regular ones by names of entries, links not followed."""
    found = (p for p in folder.glob(f"{stamp}/*{SUFFIX}") if _is_key(f"{p.parent.name}/{p.name.removesuffix(SUFFIX)}"))
    return sorted(p for p in found if is_entry(p))


def is_entry(path: Path) -> bool:
    """Whether a path is a regular file in a folder, both without following links."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) and stat.S_ISDIR(os.lstat(path.parent).st_mode)
    except (OSError, ValueError):
        return False


def _is_key(key: str) -> bool:
    return re.fullmatch(f"{ENTRY}/{ENTRY}", key) is not None


def _unfit(name: str, tensor: Tensor, like: Tensor) -> str:
    """Why a tensor of an entry is not one like this; empty if it is."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        return f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {like.dtype} {list(like.shape)}"
    return "" if not tensor.is_floating_point() or tensor.isfinite().all() else f"{name} is not finite"


def _marks(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says about itself: its place, so that one that was renamed is not taken for another, and its sum."""
    return {"entry": f"{path.parent.name}/{path.name}", "sha256": digest(tensors)}


def evicted(index: Mapping[str, Mapping[str, int]], limit: int) -> list[str]:
    """What must go so that at most `limit` bytes stay: the least computation saved times uses first, then the oldest.

    NIRVANA's LCBFU, least computationally beneficial and frequently used (2312.04429, section 4.4).
    """
    total, out = sum(row["bytes"] for row in index.values()), []
    for key in sorted(index, key=lambda k: (index[k]["saves"] * index[k]["uses"], index[k]["made"])):
        if total <= limit:
            break
        total -= index[key]["bytes"]
        out.append(key)
    return out


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes, dtypes and bytes."""
    import torch

    out = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        out.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        out.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
