"""Whether texts are about their prompts: cosine of sentence vectors, beside what any prompt would get."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from suite.modalities.text.metrics.features import features

_FORM = re.compile(r"\s*\((noun|verb|adjective|adverb)\)\s*$|^(sentence|novel|speech)\s*:?\s*")


@dataclass(frozen=True)
class Relevance:
    """Mean cosine with the own prompt, and with those of all other texts; `stderr` of the difference."""

    matched: float
    shuffled: float
    stderr: float


def subject(prompt: str) -> str:
    """What a prompt is about: without the part of speech or the domain word; the whole if nothing else is left."""
    return _FORM.sub("", prompt.lower()).strip() or prompt


def relevance(found: Tensor, prompts: Sequence[str]) -> Relevance:
    """Of text features [N, 384] and their prompts, N >= 2. The baseline is exact: every text with every other prompt.

    Only the subject of a prompt is compared, so that a domain word common to all prompts does not count.
    """
    subjects = [subject(p) for p in prompts]
    unique = list(dict.fromkeys(subjects))
    scores = (found @ features(unique).T).double()
    row = [unique.index(s) for s in subjects]
    table = scores[:, row]
    own = table.diagonal()
    others = (table.sum(1) - own) / (len(prompts) - 1)
    gain = own - others
    return Relevance(float(own.mean()), float(others.mean()), float(gain.std() / len(gain) ** 0.5))
