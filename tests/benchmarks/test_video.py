"""Clips: what the recipes cost and how good they are, beside real clips; the prompts of docs/prompts-video.txt."""

import resource
import statistics
import time
from pathlib import Path

import pytest

from suite import Engine
from suite.modalities.video.metrics import evaluate
from suite.recipe import Recipe

pytestmark = pytest.mark.bench
PROMPTS = (Path(__file__).resolve().parents[2] / "docs" / "prompts-video.txt").read_text().splitlines()
BASE = {"steps": 16, "schedule": "log-snr", "solver": "dpmpp-2m", "guidance": 3.0, "dtype": "bf16"}
CASES = {
    "reference": "reference",
    "quality": "quality",
    "balanced": "balanced",
    "fast": "fast",
    "16 steps, fora:interval=2": BASE | {"cache": ["fora:interval=2"]},
    "16 steps, int8": BASE | {"compress": ["int8"]},
}
SHOWN = ("frames_frechet", "frames_kernel", "changes_frechet", "changes_kernel", "motion_ratio", "flicker",
         "steadiness", "alignment", "r_at_5")  # fmt: skip


def open_engine(recipe):
    made = Recipe.from_dict(recipe) if isinstance(recipe, dict) else recipe
    return Engine.from_recipe(made, modality="video", allow_noop=True)


def test_quality():
    print(f"\n{len(PROMPTS)} prompts, seed 0")
    print(f"{'case':28}" + "".join(f"{name:>16}" for name in (*SHOWN, "seconds a clip", "NFE")))
    for name, recipe in CASES.items():
        with open_engine(recipe) as engine:
            results = list(engine.stream(PROMPTS, range(len(PROMPTS)), batch=4))
        clips = [clip.colour for result in results for clip in result.artifacts]
        scores = evaluate(clips, PROMPTS)
        seconds = sum(result.report.seconds["sample"] for result in results) / len(PROMPTS)
        row = [f"{scores[key]:.4g}" for key in SHOWN] + [f"{seconds:.3f}", f"{results[0].report.nfe:g}"]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in row), flush=True)
        assert len(clips) == len(PROMPTS)


def test_speed():
    """One clip after loading, text encoding and decoding included; interleaved rounds."""
    engines = {name: open_engine(name) for name in ("reference", "fast")}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.generate("a butterfly")
    for seed in range(5):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.generate("a butterfly flapping its wings", seed=seed)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        print(f"\n{name}: {statistics.median(taken):.3f} s a clip {[round(t, 3) for t in sorted(taken)]}")
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"fast is {ratio:.2f} times as fast as reference; peak memory of the process {peak:.0f} MiB")
    assert ratio > 1
