"""What the shipped recipes cost and give in every modality: the numbers of docs/benchmarks/recipes.md.

SUITE_BENCH_COUNT, SUITE_BENCH_ROUNDS and SUITE_BENCH_RECIPES make it shorter; a full run takes hours. With
SUITE_BENCH_SEEDS there are so many samples of every prompt. Recipes are divided by spaces, `reference` or what is based
on it first, and may be given caches: `reference+fora:interval=2`.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from suite import Engine
from suite.host.discovery import MODALITIES, find, installed
from suite.recipe import shipped

pytestmark = pytest.mark.bench
DOCS = Path(__file__).resolve().parents[2] / "docs"
COUNT = int(os.environ.get("SUITE_BENCH_COUNT", "1000"))
ROUNDS = int(os.environ.get("SUITE_BENCH_ROUNDS", "5"))
SEEDS = int(os.environ.get("SUITE_BENCH_SEEDS", "1"))
RECIPES = os.environ.get("SUITE_BENCH_RECIPES", "reference quality balanced fast").split()
OTHER_SEEDS = 10_000
"""First seed of the second run of the first recipe: how far apart two runs are that differ in nothing else."""


@dataclass(frozen=True)
class Case:
    """A modality with its prompts.

    Attributes:
        recipes: which recipes are run.
        model: another model than the default one.
    """

    modality: str
    prompts: str
    recipes: Sequence[str] = tuple(RECIPES)
    batch: int = 8
    model: str | None = None

    @property
    def name(self) -> str:
        return self.model or self.modality

    @property
    def metrics(self) -> Mapping[str, int]:
        return find(self.modality, installed(MODALITIES), "modality").load().headline

    def texts(self) -> list[str]:
        return (DOCS / self.prompts).read_text().splitlines()[:COUNT]


CASES = [
    Case("image", "prompts.txt"),
    Case("video", "prompts-video.txt", batch=4),
    Case("text", "prompts-text.txt"),
    Case("text", "prompts-text.txt", model="gloss-continuous"),
    Case("audio", "prompts-audio.txt", batch=4),
    Case("3d", "prompts-3d.txt", ("fast", "reference"), batch=1),  # `reference` takes six times as long: once is enough
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{statistics.median(values):.3g} [{low:.3g}, {high:.3g}]"


def opened(case: Case, recipe: str) -> Engine:
    name, *caches = recipe.split("+")
    content = yaml.safe_load(shipped()[name].read_text()) | {"cache": caches}
    return Engine.from_recipe(content, modality=case.modality, model=case.model, allow_noop=True)


@cases
def test_quality(case: Case) -> None:
    """Metrics of every recipe; in brackets how much better than the first one (plus is better)."""
    prompts, base = case.texts() * SEEDS, {}
    print(f"\n{case.name}: {len(prompts)} samples\n| recipe | NFE | {' | '.join(case.metrics)} |", flush=True)
    print("|---" * (2 + len(case.metrics)) + "|")
    for recipe in (*case.recipes, case.recipes[0]):
        first = OTHER_SEEDS if recipe == case.recipes[0] and base else 0
        with opened(case, recipe) as engine:
            results = []
            for k in range(0, len(prompts), case.batch):
                texts = prompts[k : k + case.batch]
                results.append(engine.generate_batch(texts, [first + k + i for i in range(len(texts))]))
            found = engine.modality.metrics([a for r in results for a in r.artifacts], prompts)
        base = base or found
        cells = [
            f"{found[name]:.4g} ({100 * sign * (found[name] / base[name] - 1) + 0.0:+.1f} %)"
            for name, sign in case.metrics.items()
        ]
        name = f"`{recipe}`" + (", other seeds" if first else "")
        print(f"| {name} | {results[0].report.nfe:g} | {' | '.join(cells)} |", flush=True)
        print(f"  all of {recipe}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)


@cases
def test_speed(case: Case) -> None:
    """One sample after loading, text encoding and decoding included; rounds are interleaved.

    Processor time is told as well: on a machine that other work shares it is the number to believe.
    """
    prompt = case.texts()[0]
    clocks = {"seconds": time.perf_counter, "processor seconds": time.process_time}
    times = {name: {clock: [] for clock in clocks} for name in case.recipes}
    engines = {name: opened(case, name) for name in case.recipes}
    for seed in range(-1, ROUNDS):
        for name, engine in engines.items():
            started = {clock: now() for clock, now in clocks.items()}
            engine.generate(prompt, seed=max(0, seed))
            if seed >= 0:
                for clock, now in clocks.items():
                    times[name][clock].append(now() - started[clock])
    print(
        f"\n{case.name}: one sample\n| recipe | {' | '.join(f'{c} | faster' for c in clocks)} |\n|---|---|---|---|---|"
    )
    for name, taken in times.items():
        cells = [f"`{name}`"]
        for clock, values in taken.items():
            ratios = [r / t for r, t in zip(times[case.recipes[0]][clock], values, strict=True)]
            cells += [spread(values), spread(ratios)]
        print(f"| {' | '.join(cells)} |", flush=True)
        assert len(taken["seconds"]) == ROUNDS


@cases
def test_memory(case: Case) -> None:
    """Peak memory of a whole process that makes one sample with `fast`."""
    code = (
        "from suite import Engine; "
        f"e = Engine.from_recipe('fast', modality={case.modality!r}, model={case.model!r}); "
        f"print(e.generate({case.texts()[0]!r}).report.peak_memory_bytes)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    print(f"\n{case.name}: peak memory {int(out) / 2**20:.0f} MiB")
