"""Kept keys and parallel decoding of masked text, alone and together; printed for docs/benchmarks/text-cache.md."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import pytest
import torch

from suite import Engine
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
        rows[name] = engine.modality.metrics(texts, asked)
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
            f"{m['perplexity']:.0f} | {m['words']:.1f} |"
        )
    assert min(statistics.median(seconds[name]) for name in CASES) > 0
