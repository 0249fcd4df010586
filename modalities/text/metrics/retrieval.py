"""Whether a text tells which prompt it is of, without the prompt's own words: blind retrieval among all prompts.

A text that repeats its headword is near its prompt and says nothing. So the words that begin as a word of the prompt
does are taken out first; what is left must be nearer to its own prompt than to the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from suite.modalities.text.metrics.features import features
from suite.modalities.text.metrics.relevance import subject

LETTERS = 4
"""Two words are taken for forms of one if so many of their first letters agree."""
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Retrieval:
    """`first`, `fifth`: share of texts whose own prompt is the nearest, or among the nearest five; `headword`: share
    of texts that hold a word of their prompt."""

    first: float
    fifth: float
    headword: float


def blinded(text: str, prompt: str) -> str:
    """The text without the words that begin as a word of the prompt's subject does."""
    stems = {word[:LETTERS] for word in _WORD.findall(subject(prompt).lower())}
    return " ".join(_WORD.sub(lambda m: "" if m[0][:LETTERS] in stems else m[0], text.lower()).split())


def retrieval(texts: Sequence[str], prompts: Sequence[str]) -> Retrieval:
    """Cosine of MiniLM's sentence vectors; equal subjects count once, and a text of no other word finds nothing."""
    subjects = [subject(p) for p in prompts]
    unique = list(dict.fromkeys(subjects))
    blind = [blinded(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    scores = features(blind) @ features(unique).T
    own = scores[torch.arange(len(texts)), torch.tensor([unique.index(s) for s in subjects])]
    rank = (scores > own[:, None]).sum(1)
    said = torch.tensor([bool(_WORD.search(text)) for text in blind])
    first, fifth = (float(((rank < k) & said).float().mean()) for k in (1, 5))
    whole = [" ".join(text.lower().split()) for text in texts]
    held = sum(a != b for a, b in zip(whole, blind, strict=True))
    return Retrieval(first, fifth, held / max(1, len(texts)))
