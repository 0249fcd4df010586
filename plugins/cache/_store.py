"""A folder of states that outlives a run: bounded, safe under several processes, and never believed when damaged.

    FOLDER/index.json           what each entry saves, how often it was used, its bytes; replaced as a whole
    FOLDER/STAMP/NAME.safetensors    one entry: `vector` to find it by, `state`, and what else belongs to it

A stamp says what an entry is good for (weights, recipe, grid, shape), so another model's entries are never seen. Every
entry carries the sha256 of its tensors. All changes are made under one lock, and files are renamed into place.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite import temporary
from suite.errors import ConfigError
from suite.output import write, write_text

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "suite-store/1"
INDEX = "index.json"
SUFFIX = ".safetensors"
WAIT = 30.0
"""Seconds to wait for another process's lock."""
MIB = 2**20


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

    def vectors(self, stamp: str) -> tuple[list[str], Tensor]:
        """Names of all entries with this stamp, and their vectors [n, D] float32, which `take` still has to verify."""
        import torch

        names, rows = [], []
        for path in sorted((self.folder / stamp).glob(f"*{SUFFIX}")):
            if path not in self._vectors:
                tensors = self._read(path, only="vector")
                if tensors is None:
                    self._drop(stamp, path)
                    continue
                self._vectors[path] = tensors["vector"]
            names.append(path.name.removesuffix(SUFFIX))
            rows.append(self._vectors[path])
        return names, torch.stack(rows) if rows else torch.zeros(0, 0)

    def take(self, stamp: str, name: str) -> dict[str, Tensor] | None:
        """An entry that is whole, counted as used; None (and gone, with a warning) if it is damaged."""
        path = self.folder / stamp / f"{name}{SUFFIX}"
        tensors = self._read(path)
        with self._unwritable(), self._locked():
            index = self._index()
            row = index.get(f"{stamp}/{name}")
            if tensors is not None and row is not None:
                row["uses"] += 1
                self._write(index)
        if tensors is None:
            self._drop(stamp, path)
        return tensors

    def _drop(self, stamp: str, path: Path) -> None:
        with self._unwritable(), self._locked():
            index = self._index()
            self._vectors.pop(path, None)
            path.unlink(missing_ok=True)
            index.pop(f"{stamp}/{path.name.removesuffix(SUFFIX)}", None)
            self._write(index)

    def _read(self, path: Path, only: str = "") -> dict[str, Tensor] | None:
        """The tensors of a file, or one of them, unverified; None if it cannot be read, or is not what was written."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as box:
                if only:
                    return {only: box.get_tensor(only)}
                tensors = {name: box.get_tensor(name) for name in box.keys()}
                said = box.metadata() or {}
        except FileNotFoundError:  # another process evicted it
            return None
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{self.name}: {path} is damaged and was dropped: {error}", stacklevel=2)
            return None
        if said != _marks(path, tensors):
            warnings.warn(f"{self.name}: {path} is damaged and was dropped: its content has changed", stacklevel=2)
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
            if key in index and path.exists():
                return False
            path.parent.mkdir(exist_ok=True)
            kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            write(path, lambda made: save_file(kept, made, _marks(path, kept)))
            made = 1 + max((row["made"] for row in index.values()), default=0)
            index[key] = {"saves": saves, "uses": 1, "bytes": path.stat().st_size, "made": made}
            for worst in evicted(index, self.limit):
                (self.folder / f"{worst}{SUFFIX}").unlink(missing_ok=True)
                self._vectors.pop(self.folder / f"{worst}{SUFFIX}", None)
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

        try:
            with FileLock(self.folder / ".lock", timeout=WAIT):
                yield
        except Timeout as error:
            raise ConfigError(
                f"{self.name}: another process has held the lock of the store {self.folder} for {WAIT:g} s; end it, or "
                "name another folder"
            ) from error

    def _index(self) -> dict[str, dict[str, int]]:
        file = self.folder / INDEX
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ConfigError(
                    f"{self.name}: the store {self.folder} is of format {content['format']!r}, expected {FORMAT!r}; "
                    "name another folder, or delete it"
                )
            rows = content["entries"]
            if all({"saves", "uses", "bytes", "made"} <= row.keys() for row in rows.values()):
                return rows
            raise ValueError("an entry is not whole")
        except FileNotFoundError:
            damage = ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damage = f"{self.name}: {file} is damaged and was made anew; counts of uses are lost: {error}"
        files = sorted(self.folder.glob(f"*/*{SUFFIX}"))
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
