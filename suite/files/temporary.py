"""Where files are written before they are renamed into place: a hidden folder of this process, recognised as ours.

    .suite-HOST-PID-RANDOM.tmp/     made exclusively, so nobody else's; what is in it has its own name and ending

A process that is killed leaves its folder behind. The next write beside it removes it, if its process is gone: only
what has exactly this form, is a folder of this user, and was made on this host, since elsewhere a process may live.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_FORM = re.compile(r"\.suite-([0-9a-f]{8})-([1-9]\d{0,8})-[0-9a-f]{16}\.tmp")


@contextmanager
def place(beside: Path) -> Iterator[Path]:
    """A new folder in the folder `beside`, removed with what is left in it afterwards."""
    _sweep(beside)
    folder = beside / f".suite-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, lies on the disk."""
    if path.is_dir():
        for part in path.iterdir():
            flush(part)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_name(folder: Path) -> None:
    """Wait until the names in a folder lie on the disk, where its file system can tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what processes that are gone have left in a folder."""
    with os.scandir(folder) as entries:
        left = [e for e in entries if (found := _FORM.fullmatch(e.name)) and found[1] == _host() and _gone(found[2])]
    for entry in left:
        with suppress(OSError):  # another process may be removing it too
            if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                shutil.rmtree(entry.path, ignore_errors=True)


def _gone(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@cache
def _host() -> str:
    """Of the host and, in a container, of its own numbers of processes."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]
