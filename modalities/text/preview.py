"""Texts of a run in progress, by the plainest samplers; only for looking. The suite's engine has the solvers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.diffusion import noise as noises
from suite.files.output import write_text
from suite.modalities.text import embedding
from suite.modalities.text.config import TextTraining
from suite.modalities.text.data import TextData
from suite.modalities.text.vocabulary import MASK, PAD, PROMPT, written

PROMPTS = (
    "disaster (noun)",
    "dog (noun)",
    "run (verb)",
    "beautiful (adjective)",
    "slowly (adverb)",
    "chemistry (noun)",
    "bridge (noun)",
    "to paint (verb)",
    "sentence: happy",
    "sentence: water",
    "novel: whale, captain",
    "novel",
    "speech: peace, nations",
    "speech: children, schools",
)


def write_samples(writer: Any, data: TextData, config: TextTraining, path: Path, steps: int = 32) -> None:
    """Write one text for each of `PROMPTS` to `path`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.tokenizer)
    device = next(writer.parameters()).device
    coded = [e.ids[:PROMPT] for e in tokenizer.encode_batch(list(PROMPTS))]
    prompt = torch.tensor([ids + [PAD] * (PROMPT - len(ids)) for ids in coded], device=device)
    mask = torch.tensor([[k < len(ids) for k in range(PROMPT)] for ids in coded], device=device)
    draw = _masked if config.family == "masked" else _continuous
    tokens = draw(writer, prompt, mask, min(config.canvases), steps, config)
    lines = [f"{p} -> {written(tokenizer, row)}" for p, row in zip(PROMPTS, tokens, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def _masked(
    writer: Any, prompt: Tensor, mask: Tensor, length: int, steps: int, config: TextTraining
) -> list[list[int]]:
    del config
    x = torch.full((len(prompt), length), MASK, device=prompt.device)
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        logits = writer(prompt, mask, x).float()
        logits[..., MASK] = -torch.inf
        chosen = torch.multinomial(logits.softmax(-1).flatten(0, 1).cpu(), 1, generator=rng).view_as(x).to(x.device)
        # Each hidden place is revealed with chance (alpha_s - alpha_t) / (1 - alpha_t) = 1 / (steps left).
        reveal = torch.rand(x.shape, generator=rng).to(x.device) * (steps - step) < 1
        x = torch.where((x == MASK) & reveal, chosen, x)
    return x.tolist()


def _continuous(
    writer: Any, prompt: Tensor, mask: Tensor, length: int, steps: int, config: TextTraining
) -> list[list[int]]:
    schedule = noises.from_config(config.noise)
    table = embedding.normalised(writer.table)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompt), length, config.width, generator=rng).to(prompt.device)
    before, logits = torch.zeros_like(x), None
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    for t, s in itertools.pairwise(times):
        at = t.expand(len(x)).to(x.device)
        logits = writer(prompt, mask, embedding.network_input(x, before, schedule, at.float(), writer.network))
        before = embedding.estimate(logits, table)
        ratio = float(schedule.sigma(s) / schedule.sigma(t))
        x = ratio * x + float(schedule.alpha(s) - schedule.alpha(t) * ratio) * before
    assert logits is not None
    return logits.argmax(-1).tolist()
