"""What an installed cache costs that never hits; printed for docs/benchmarks/caches.md.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_cache_overhead.py -m bench -s -q

Every evaluation is computed, and what a later one could reuse is kept, compared and measured as in any run.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from suite import Engine
from suite.call import Call
from suite.diffusion.denoiser import Cond, Counter, Denoiser, concatenate
from suite.fitting import cache_file
from suite.host.discovery import installed
from suite.network.patch import Patches
from suite.plugin import build
from suite.recipe import Recipe
from suite.run import Run
from suite.wrap import Wrap

ROUNDS = int(os.environ.get("SUITE_BENCH_ROUNDS", "9"))
EVALUATIONS = 10
AIM = 0.01


@dataclass(frozen=True)
class Case:
    """A setting that is installed and never hits.

    Attributes:
        options: of the cache.
        stride: evaluation k is step `stride` k: with an interval of 2 and a stride of 2 every one is computed and kept.
        steps: of the run; those of the file for a calibrated cache.
    """

    options: dict[str, Any]
    stride: int = 1
    steps: int = 20
    model: str = "emoji-64"


LEAST = 1e-30
CASES: dict[str, Case] = {
    "fora": Case({"interval": 2}, stride=2),
    "pab": Case({"attention": 2, "cross_attention": 2, "mlp": 2, "start": 0.0, "end": 1.0}, stride=2),
    "delta-dit": Case({"interval": 2}, stride=2),
    "t-gate": Case({"gate": 0.999}),
    "deepcache": Case({"interval": 2}, stride=2, model="emoji-unet-32"),
    "early-exit": Case({"depth": (0.999,)}),
    "first-block": Case({"threshold": LEAST}),
    "teacache": Case({"threshold": LEAST}, steps=50),
    "magcache": Case({"threshold": LEAST}, steps=50),
    "learned": Case({"threshold": LEAST}, steps=20),
    "taylorseer": Case({"interval": 2}, stride=2),
    "taylorseer, order 2": Case({"interval": 2, "order": 2}, stride=2),
    "taylorseer, residual": Case({"interval": 2, "level": "residual"}, stride=2),
    "forecast": Case({"interval": 2}, stride=2),
}


@cache
def engine_of(model: str) -> Engine:
    return Engine.from_recipe(Recipe.from_dict({"dtype": "fp32", "guidance": 3.0}), model=model)


@dataclass
class Bench:
    """A model and the evaluations of a plain run of it, guidance branches as one batch."""

    engine: Engine
    states: list[tuple[Tensor, Tensor, Call]]
    cond: Cond

    run: Run

    @staticmethod
    def of(case: Case, name: str) -> Bench:
        engine = engine_of(case.model)
        problem = engine.problem(["a red apple"], [0], Counter())
        shipped = cache_file.shipped().get(cache_file.default_name(name, case.model, case.steps))
        times = cache_file.read(shipped, name).times if shipped else torch.linspace(1, 0, case.steps + 1).tolist()
        cond = concatenate([problem.cond["cond"], problem.cond["uncond"]])
        x0 = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(1)) * 0.5
        states = []
        for k in range(EVALUATIONS):
            t = torch.tensor(times[k], dtype=torch.float64)
            x = problem.noise.alpha(t) * x0 + problem.noise.sigma(t) * problem.x
            total = case.steps * case.stride
            call = Call(k * case.stride, total, times[k], times[k + 1], branch="cond+uncond", run_id="bench")
            states.append((torch.cat([x, x]).float(), t, call))
        return Bench(engine, states, cond, replace(problem.run, steps=case.steps))

    def wrap(self, name: str, case: Case) -> Wrap:
        plugin: Any = build(installed()[name].load(), case.options, name=name)
        wanted = inspect.signature(type(plugin).cache).parameters
        given = {"network": self.engine.network, "noise": self.engine.modality.noise, "run": self.run}
        return plugin.cache(**{k: v for k, v in given.items() if k in wanted})

    def bare(self) -> Denoiser:
        return self.engine.bare(self.run, Counter())

    @torch.inference_mode()
    def once(self, denoiser: Denoiser) -> list[float]:
        """CPU seconds of each evaluation."""
        out = []
        for x, t, call in self.states:
            started = time.process_time()
            denoiser.denoise(x, t, self.cond, call)
            out.append(time.process_time() - started)
        return out


@contextmanager
def under(bench: Bench, wrap: Wrap) -> Iterator[Denoiser]:
    """The denoiser with the cache installed."""
    module = bench.engine.network.module
    if wrap.network:
        wrap.network(module)
    try:
        bare = bench.bare()
        yield wrap.denoiser(bare) if wrap.denoiser else bare
    finally:
        if wrap.undo:
            wrap.undo()


@contextmanager
def hollow(bench: Bench) -> Iterator[None]:
    """Attention, MLPs and residual layers answer from a table: what a cache adds is then seen without their noise."""
    patches, network = Patches(), bench.engine.network

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        kept: dict[Any, Any] = {}

        def answer(*args: Any, **kwargs: Any) -> Any:
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if first.shape not in kept:
                kept[first.shape] = forward(*args, **kwargs)
            return kept[first.shape]

        return answer

    parts = [ref.module for ref in network.blocks("attention", "cross_attention", "mlp")]
    parts += [layer for name, layer in network.module.named_modules() if name.split(".")[-2:-1] == ["resnets"]]
    for part in parts:
        patches.replace(part, make)
    try:
        yield
    finally:
        patches.undo()


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(bench: Bench, denoiser: Denoiser) -> tuple[float, float]:
    """(Python functions entered, torch operations) an evaluation."""
    entered = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(profile)
    try:
        bench.once(denoiser)
    finally:
        sys.setprofile(None)
    with Operations() as operations:
        bench.once(denoiser)
    return entered / EVALUATIONS, operations.count / EVALUATIONS


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return mid, low, high


def measure(bench: Bench, name: str, case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each evaluation with and without the cache: the least of interleaved rounds.

    Whatever else the machine does only adds time, so the least is what comes nearest to the work itself.
    """
    cached, plain = [], []
    for number in range(rounds):
        order = [True, False] if number % 2 else [False, True]
        for installed_ in order:
            if installed_:
                wrap = bench.wrap(name, case)
                with under(bench, wrap) as denoiser:
                    seconds = bench.once(denoiser)
                assert wrap.report().facts["hits"] == 0, "the setting must never hit"
            else:
                seconds = bench.once(bench.bare())
            (cached if installed_ else plain).append(seconds)
    # The first evaluation has nothing to compare with.
    return list(map(min, *cached))[1:], list(map(min, *plain))[1:]


@pytest.mark.bench
@pytest.mark.parametrize("title", CASES)
def test_a_cache_that_never_hits(title: str) -> None:
    case, name = CASES[title], title.partition(",")[0]
    bench = Bench.of(case, name)
    bench.once(bench.bare())
    cached, plain = measure(bench, name, case, ROUNDS)
    ratio, low, high = middle([a / b for a, b in zip(cached, plain, strict=True)])
    with hollow(bench):
        bench.once(bench.bare())
        added, without = measure(bench, name, case, 4 * ROUNDS)
    over = statistics.median(plain)
    extra, least, most = middle([(a - b) / over for a, b in zip(added, without, strict=True)])
    python, operations = counted(bench, bench.bare())
    with under(bench, bench.wrap(name, case)) as denoiser:
        more_python, more_operations = counted(bench, denoiser)
    print(
        f"\n| `{title}` | {1000 * over:.1f} | {ratio:.3f} [{low:.3f}, {high:.3f}] | {100 * extra:.2f} % "
        f"[{100 * least:.2f}, {100 * most:.2f}] | {more_python - python:+.0f} of {python:.0f} | "
        f"{more_operations - operations:+.1f} of {operations:.0f} |" + (" above the aim" if extra > AIM else "")
    )
