"""What the recipes and the first methods cost in quality: the prompts of docs/prompts.txt, equal seeds for all."""

import os
from pathlib import Path

import pytest
import torch

from suite import Engine
from suite.host.prompts import expand
from suite.modalities.image import as_tensor
from suite.modalities.image.metrics import evaluate
from suite.recipe import Recipe

pytestmark = pytest.mark.bench
PROMPTS = (Path(__file__).resolve().parents[2] / "docs" / "prompts.txt").read_text().splitlines()
SEEDS = int(os.environ.get("SUITE_BENCH_SEEDS", "2"))

BASE = {"steps": 20, "schedule": "log-snr", "solver": "dpmpp-2m", "guidance": 3.0, "dtype": "bf16"}
CASES = {
    "reference": "reference",
    "quality": "quality",
    "balanced": "balanced",
    "fast": "fast",
    "20 steps": BASE,
    "20 steps, fora:interval=2": BASE | {"cache": ["fora:interval=2"]},
    "20 steps, first-block:threshold=0.1": BASE | {"cache": ["first-block:threshold=0.1"]},
    "20 steps, int8": BASE | {"compress": ["int8"]},
    "10 steps": BASE | {"steps": 10},
}


def test_quality():
    print(f"\n{len(PROMPTS)} prompts, {SEEDS} seeds each")
    head = ("frechet", "kernel x1000", "alignment", "R@5", "difference to reference", "seconds a picture", "NFE")
    print(f"{'case':38}" + "".join(f"{h:>24}" for h in head))
    exact = None
    for name, recipe in CASES.items():
        engine = Engine.from_recipe(Recipe.from_dict(recipe) if isinstance(recipe, dict) else recipe, allow_noop=True)
        engine.generate("a red apple")
        prompts, seeds = expand(PROMPTS, SEEDS, 0, hold=True)
        results = list(engine.stream(prompts, seeds, batch=8))
        pictures = as_tensor([p for r in results for p in r.artifacts])
        exact = pictures if exact is None else exact
        scores = evaluate(pictures, prompts)
        seconds = sum(r.report.seconds["sample"] for r in results) / len(prompts)
        difference = (pictures.float() - exact.float()).abs().mean() / 255
        row = (
            f"{scores['frechet']:.3f}",
            f"{1000 * scores['kernel']:.3f} ± {1000 * scores['kernel_stderr']:.3f}",
            f"{scores['alignment']:.4f} ± {scores['alignment_stderr']:.4f}",
            f"{scores['r_at_5']:.3f}",
            f"{difference:.4f}",
            f"{seconds:.4f}",
            f"{results[0].report.nfe:.0f}",
        )
        print(f"{name:38}" + "".join(f"{c:>24}" for c in row), flush=True)
        engine.close()
        del engine
    assert torch.isfinite(exact.float()).all()
