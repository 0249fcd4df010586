"""How much the denoiser's answer changes from one evaluation to the next: sampling against distillation (rule C33)."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.diffusion.denoiser import NetworkDenoiser

PROMPT, EVALUATIONS = "a red apple", 24


def answers(monkeypatch: pytest.MonkeyPatch, modality: str, **options: Any) -> list[Tensor]:
    """What the network's denoiser answered for the conditional branch, in order; the same model both times."""
    seen: list[Tensor] = []
    plain = NetworkDenoiser.denoise

    def denoise(self: NetworkDenoiser, x: Tensor, t: Tensor, cond: Any, call: Any) -> Tensor:
        out = plain(self, x, t, cond, call)
        seen.append(out[:1].detach().clone())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(NetworkDenoiser, "denoise", denoise)
        recipe = {"steps": EVALUATIONS, "guidance": 4.0, "solver": "ddim", "schedule": "uniform", "dtype": "fp32"}
        with Engine.from_recipe(recipe, modality=modality, model="emoji-64") as engine:
            engine.generate(PROMPT, seed=0, options=options)
    return seen


def change(seen: list[Tensor]) -> list[float]:
    """Root mean square difference of neighbours, relative to the later one."""
    return [float((b - a).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in itertools.pairwise(seen)]


@pytest.mark.bench
def test_neighbouring_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """C33: a step of a sampler asks nearly the same question again; an iteration of SDS does not."""
    sampled = change(answers(monkeypatch, "image"))
    distilled = change(answers(monkeypatch, "3d", iterations=EVALUATIONS, resolution=24, refine=0))
    for name, values in (("sampling", sampled), ("distillation", distilled)):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"\n| {name} | {middle:.3f} [{low:.3f}, {high:.3f}] | {min(values):.3f} |")
    assert torch.tensor(sampled).median() < torch.tensor(distilled).median() / 2
