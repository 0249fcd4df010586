"""Our caches beside diffusers' hooks and cache-dit at the same setting; printed for docs/benchmarks/caches.md.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_cache_references.py -m bench -s -q

One sample without guidance, DDIM on even times, the same noise: there the decisions of both are the same by theory.
Ours decide for each row and branch, so with more rows theirs are another method.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.diffusion.denoiser import Counter
from suite.diffusion.noise import Flow, NoiseSchedule
from suite.diffusion.sampler import Problem, march
from suite.fitting import cache_file
from suite.fitting.cache_file import CacheFile
from suite.fitting.stamp import RunStamp
from suite.network import Network
from suite.observe.activity import Activity
from suite.plugin import Plugin
from suite.plugins.cache.cache_dit import CacheDiT
from suite.plugins.cache.diffusers_cache import DiffusersCache
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.magcache import MagCache
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.taylorseer import TaylorSeer
from suite.recipe import Recipe
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
from _tiny import Setup

ROUNDS = int(os.environ.get("SUITE_BENCH_ROUNDS", "7"))
STEPS = 50
THRESHOLD = {"emoji-64": 0.1, "wan": 0.12}


@dataclass
class Shipped:
    """`emoji-64`, 6 blocks of width 192."""

    name: str = "emoji-64"
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        content = {"dtype": "fp32", "steps": STEPS, "guidance": 1.0, "solver": "ddim", "schedule": "uniform"}
        self.engine = Engine.from_recipe(Recipe.from_dict(content), model=self.name)

    @property
    def network(self) -> Network:
        return self.engine.network

    @property
    def noise(self) -> NoiseSchedule:
        return self.engine.modality.noise

    @property
    def run(self) -> Run:
        return self.problem(None).run

    def problem(self, observe: Any) -> Problem:
        return self.engine.problem(["a red apple"], [0], Counter(), observe)

    def sample(self, observe: Any) -> Tensor:
        return march(self.problem(observe))


@dataclass
class Small:
    """A tiny WanTransformer3DModel with random weights: what is measured is nearly all Python."""

    name: str = "wan"
    setup: Setup = field(default_factory=lambda: Setup("wan", steps=STEPS, clock=0.003))
    noise: NoiseSchedule = field(default_factory=Flow)

    @property
    def network(self) -> Network:
        return self.setup.network

    @property
    def run(self) -> Run:
        return self.setup.run((0,))

    def sample(self, observe: Any) -> Tensor:
        from suite.wrap import Wrap, WrapReport

        wrap = Wrap(report=lambda: WrapReport(0, "", reason="-"), denoiser=observe)
        return self.setup.generate((0,), [wrap] if observe else [])


@contextmanager
def installed(subject: Any, plugin: Plugin | None) -> Iterator[Any]:
    """The wrap of a plugin in the network; None without one."""
    if plugin is None:
        yield None
        return
    import inspect

    cache: Any = plugin.cache  # pyright: ignore[reportAttributeAccessIssue]
    given = {"network": subject.network, "noise": subject.noise, "run": subject.run}
    wrap = cache(**{k: v for k, v in given.items() if k in inspect.signature(cache).parameters})
    try:
        if wrap.network:
            wrap.network(subject.network.module)
        yield wrap
    finally:
        if wrap.undo:
            wrap.undo()


@torch.inference_mode()
def once(subject: Any, plugin: Plugin | None) -> tuple[Tensor, float]:
    """(x0, CPU seconds of the sampling)."""
    with installed(subject, plugin) as wrap:
        started = time.process_time()
        x0 = subject.sample(wrap.denoiser if wrap else None)
        return x0, time.process_time() - started


@torch.inference_mode()
def calls(subject: Any, plugin: Plugin | None) -> tuple[int, int]:
    """(blocks, attentions and MLPs) that really ran."""
    network = subject.network
    grid = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()
    ran = {"block": 0, "part": 0}
    activity = Activity(network.blocks("block", "attention", "cross_attention", "temporal_attention", "mlp"), grid)
    kinds = {ref.name: "block" if ref.kind == "block" else "part" for ref in activity.refs}

    def counted(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            ran[kinds[name]] += 1
            return out

        return run

    for ref in activity.refs:
        activity.patches.replace(ref.module, lambda forward, name=ref.name: counted(name, forward))
    try:
        with installed(subject, plugin) as wrap:
            subject.sample(wrap.denoiser if wrap else None)
    finally:
        activity.undo()
    return ran["block"], ran["part"]


def ratios_of(subject: Any, folder: Path) -> tuple[str, tuple[float, ...]]:
    """A calibration of MagCache, and the same numbers as diffusers wants them."""
    shipped = cache_file.shipped().get(f"magcache-{subject.name}-{STEPS}")
    if shipped:
        (curve,) = cache_file.read(shipped, "magcache").values["ratios"][:1]
        return str(shipped), tuple(1.0 if r is None else r for r in curve)
    curve = [None, *[0.99 - 0.0002 * k for k in range(1, STEPS)]]
    stamp = RunStamp("a model", "a noise", "ddim", STEPS, "uniform", "")
    times = tuple(torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist())
    file = folder / "magcache.json"
    cache_file.write(file, CacheFile("magcache", stamp, times, {"ratios": [curve]}, {}))
    return str(file), tuple(1.0 if r is None else r for r in curve)


def pairs(subject: Any, folder: Path) -> list[tuple[str, Plugin, str, Plugin]]:
    """(name, ours, name, theirs) with the same method and setting."""
    threshold = THRESHOLD[subject.name]
    file, ratios = ratios_of(subject, folder)
    every = ("attention", "cross_attention", "mlp")
    return [
        (
            "first-block",
            FirstBlock(threshold),
            "diffusers first-block",
            DiffusersCache("first-block", threshold=threshold),
        ),
        ("first-block", FirstBlock(threshold), "cache-dit F1B0", CacheDiT(threshold, warmup=1)),
        ("magcache", MagCache(0.06, file), "diffusers mag", DiffusersCache("mag", threshold=0.06, ratios=ratios)),
        (
            "taylorseer",
            TaylorSeer(2, 1, kinds=every),
            "diffusers taylorseer",
            DiffusersCache("taylorseer", interval=2, order=1, warmup=1),
        ),
        (
            "pab",
            PAB(2, 2, 2, start=0.3, end=0.8),
            "diffusers pab",
            DiffusersCache("pab", interval=2, start=0.701, end=0.201),
        ),
    ]


def middle(values: list[float]) -> str:
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{mid:.3f} [{low:.3f}, {high:.3f}]"


@pytest.mark.bench
@pytest.mark.parametrize("kind", [Small, Shipped])
def test_ours_beside_theirs(kind: Any, tmp_path: Path) -> None:
    subject = kind()
    plain, _ = once(subject, None)
    norm = float(plain.square().mean().sqrt())
    print(f"\n{subject.name}, {STEPS} steps, without a cache: {calls(subject, None)} blocks, parts")
    for mine, ours, other, theirs in pairs(subject, tmp_path):
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        outs: dict[str, Tensor] = {}
        for number in range(ROUNDS + 1):
            order = [("ours", ours), ("theirs", theirs)]
            for which, plugin in order if number % 2 else reversed(order):
                outs[which], spent = once(subject, plugin)
                if number:  # the first round warms up
                    seconds[which].append(spent)
        errors = {w: float((x - plain).square().mean().sqrt()) / norm for w, x in outs.items()}
        apart = float((outs["ours"] - outs["theirs"]).square().mean().sqrt()) / norm
        rates = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        least = min(seconds["ours"]) / min(seconds["theirs"])
        print(
            f"| `{mine}` | {other} | {middle(rates)} | {least:.3f} | {calls(subject, ours)} | {calls(subject, theirs)} "
            f"| {errors['ours']:.5f} | {errors['theirs']:.5f} | {apart:.1e} |"
        )
