"""Kept keys and parallel decoding of masked text, alone and together; printed for docs/benchmarks/text-cache.md."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.diffusion.denoiser import Counter
from suite.diffusion.sampler import march
from suite.modalities.text.metrics.fluency import perplexity
from suite.plugins.cache.dual_kv import DualKV
from suite.plugins.cache.prefix_kv import PrefixKV
from suite.recipe import Recipe

PROMPTS = [
    "dog (noun)", "run (verb)", "bright (adjective)", "slowly (adverb)", "sentence: water", "sentence: market",
    "speech: peace, nations", "novel: a garden", "disaster (noun)", "build (verb)", "sentence: winter",
    "speech: freedom", "house (noun)", "sing (verb)", "sentence: a letter", "novel: the sea",
]  # fmt: skip
LENGTH = 64
ROUNDS = int(os.environ.get("SUITE_BENCH_ROUNDS", "1"))
TEXTS = int(os.environ.get("SUITE_BENCH_TEXTS", "48"))
#: Everything that is measured, with the threshold of parallel decoding; 1 uncovers one token an evaluation.
CASES = {
    "none": (1.0, None),
    "cache": (1.0, "dual-kv"),
    "parallel": (0.9, None),
    "both": (0.9, "dual-kv"),
    "both, prefix": (0.9, "prefix-kv"),
    "both, refresh 4": (0.9, "dual-kv:refresh=4"),
}
if chosen := os.environ.get("SUITE_BENCH_CASES"):  # by name, divided by semicolons; `none` is always there
    CASES = {name: CASES[name] for name in CASES if name == "none" or name in chosen.split(";")}


def engine_of(name: str, block: int, temperature: float) -> Engine:
    threshold, cache = CASES[name]
    solver = f"threshold:threshold={threshold},temperature={temperature},block={block}"
    content: dict = {"steps": LENGTH, "schedule": "uniform", "solver": solver, "dtype": "fp32"}
    if cache:
        content["cache"] = [f"{cache}{',' if ':' in cache else ':'}block={block}"]
    return Engine.from_recipe(Recipe.from_dict(content), modality="text", allow_noop=True)


def median(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def perplexity_stderr(texts: Sequence[str]) -> float:
    """Of the perplexity of all texts together, for these prompts: a jackknife over the batches, one of each prompt."""
    groups = len(texts) // len(PROMPTS)
    without = [
        perplexity([text for k, text in enumerate(texts) if k // len(PROMPTS) != left]).perplexity
        for left in range(groups)
    ]
    middle = statistics.mean(without)
    return ((groups - 1) / groups * sum((value - middle) ** 2 for value in without)) ** 0.5


@pytest.mark.bench
@pytest.mark.parametrize(("block", "temperature"), [(8, 1.0)])
def test_cache_and_parallel_decoding(block: int, temperature: float) -> None:
    """Tokens a second of single texts in interleaved rounds; quality of `TEXTS` texts in batches of 16.

    Seconds are of this process, on one thread, so that other processes on the machine count little.
    """
    torch.set_num_threads(1)
    engines = {name: engine_of(name, block, temperature) for name in CASES}
    options = {"length": LENGTH}
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    spent: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(ROUNDS):
        for index, prompt in enumerate(PROMPTS):
            for name, engine in engines.items():
                start = time.process_time()
                result = engine.generate(prompt, seed=1000 * turn + index, options=options)
                seconds[name].append(time.process_time() - start)
                spent[name].append(result.report.nfe)
    rows = {}
    for name, engine in engines.items():
        texts: list[str] = []
        asked = PROMPTS * (TEXTS // len(PROMPTS))
        for k in range(0, TEXTS, 16):
            texts += engine.generate(PROMPTS, seed=5000 + k, options=options).artifacts
        rows[name] = engine.modality.metrics(texts, asked) | {"perplexity_stderr": perplexity_stderr(texts)}
        engine.close()
    print(f"\nblock {block}, temperature {temperature}, {len(PROMPTS) * ROUNDS} single texts, {TEXTS} for quality")
    print("| case | tokens a second | times faster | evaluations | relevance | perplexity | words |")
    print("|---|---|---|---|---|---|---|")
    for name in CASES:
        ratio = [a / b for a, b in zip(seconds["none"], seconds[name], strict=True)]
        m = rows[name]
        print(
            f"| {name} | {LENGTH / statistics.median(seconds[name]):.0f} | {median(ratio)} | "
            f"{statistics.mean(spent[name]):.1f} | {m['relevance']:.3f} ± {m['relevance_stderr']:.3f} | "
            f"{m['perplexity']:.0f} ± {m['perplexity_stderr']:.0f} | {m['words']:.1f} |"
        )
    assert min(statistics.median(seconds[name]) for name in CASES) > 0


@pytest.mark.bench
def test_distance_from_the_plain_answer() -> None:
    """What is not exact, measured: a plain run is followed, and the cached network is asked the same at every step.

    Half the sum of differences of the two answers, at the masked places of the block, and how often the most
    probable token is the same; evaluations that are whole are left out, as they are equal.
    """
    block = 8
    names = {"prefix-kv": {}, "dual-kv": {}, "dual-kv:refresh=4": {"refresh": 4}, "dual-kv:refresh=2": {"refresh": 2}}
    far: dict[str, list[float]] = {name: [] for name in names}
    alike: dict[str, list[float]] = {name: [] for name in names}
    with engine_of("none", block, 1.0) as engine:
        for index, prompt in enumerate(PROMPTS[:8]):
            problem = engine.problem([prompt], (index,), Counter())
            problem = replace(problem, x=torch.full((1, LENGTH), int(problem.x.max())))
            mask, asked = int(problem.x.max()), []

            inner = problem.denoiser.inner

            class Watch:
                def denoise(
                    self, x: Tensor, t: Tensor, cond: Any, call: Any, asked: list = asked, inner: Any = inner
                ) -> Tensor:
                    out = inner.denoise(x, t, cond["cond"], call)
                    asked.append((x.clone(), t, call, out))
                    return out

            with torch.inference_mode():
                march(replace(problem, denoiser=Watch()))
                for name, options in names.items():
                    plugin = (PrefixKV if name == "prefix-kv" else DualKV)(block, **options)
                    wrap = plugin.cache(engine.network, problem.run)
                    wrap.network(engine.network.module)
                    cached = wrap.denoiser(problem.denoiser.inner)
                    for x, t, call, plain in asked:
                        before = wrap.report().facts["parts"]
                        got = cached.denoise(x, t, problem.cond["cond"], call)
                        if wrap.report().facts["parts"] == before:
                            assert torch.equal(got, plain)
                            continue
                        first = int((x[0] == mask).nonzero()[0]) // block * block
                        here = [k for k in range(first, first + block) if x[0, k] == mask]
                        far[name] += (0.5 * (got - plain)[0, here].abs().sum(-1)).tolist()
                        alike[name] += (got[0, here].argmax(-1) == plain[0, here].argmax(-1)).float().tolist()
                    wrap.undo()
    for name in names:
        middle, high = statistics.median(far[name]), statistics.quantiles(far[name], n=10)[-1]
        same = 100 * statistics.mean(alike[name])
        print(f"\n| `{name}` | {middle:.4f} | {high:.3f} | {same:.1f} % | {len(far[name])} |")
    assert statistics.mean(far["dual-kv:refresh=2"]) < statistics.mean(far["dual-kv"])
