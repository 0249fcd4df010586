"""`RunReport`: what happened in one run, as plain data; the same schema for every modality."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

REPORT_VERSION = 1


@dataclass(frozen=True)
class PluginReport:
    """One active plugin: what it was asked and what it did; `lossless` is None of a schedule and a solver."""

    name: str
    hook: str
    distribution: str
    version: str
    lossless: bool | None
    did: int | None = None
    what: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunReport:
    """What happened.

    Attributes:
        modality, model: what was generated with.
        model_hash: sha256 of the weight files.
        prompts, seeds: one an item of the batch.
        recipe: complete, so that it can be run again.
        nfe: network evaluations a sample, guidance branches counted apart.
        depth: sequential network calls.
        steps: solver steps that were run.
        seconds: wall-clock of each stage, of this run; no warm-up is subtracted.
        network_bytes: parameters and buffers as they lie in memory.
        peak_memory_bytes: of the process (CPU) or of the device.
        plugins: the active chain, in the host's order.
        warnings: rules that advise against the chain, what of the prompts is not known or not read, empty results.
        versions: of the packages that decide the numbers.
        negative: the negative prompt.
        macs: multiply-accumulates a sample that ran on this rank while sampling; None if they were not counted.
        options: what the request chose besides the prompt.
        encoding: of the prompts: whether it was reused from an earlier request of this engine, and the bytes held.
        cache_memory: most bytes that all caches held together, as the host saw it, and the limit; empty without a cache
            that holds any.
        blocks: which blocks ran at which step (see `suite.observe.activity`), if that was asked.
        start: with which file sampling began (init, sha256, strength), at which time and after which of how many
            steps; None if it began with noise.
    """

    modality: str
    model: str
    model_hash: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    recipe: Mapping[str, Any]
    device: str
    dtype: str
    threads: int
    world: int
    steps: int
    nfe: float
    depth: int
    seconds: Mapping[str, float]
    network_bytes: int
    peak_memory_bytes: int
    plugins: Sequence[PluginReport]
    warnings: Sequence[str]
    versions: Mapping[str, str]
    negative: str = ""
    macs: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    cache_memory: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, Any] | None = None
    report_version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions; absent ones are left out."""
    return {name: version for name in names if (version := _version(name))}


@cache  # reading metadata takes milliseconds, and every run reports
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def peak_memory(device: str) -> int:
    """Peak bytes: of the device's allocator on a GPU, else of the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
