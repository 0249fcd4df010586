"""How various texts are: distinct n-grams between them (Li 2016), and repetition inside of them (Welleck 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from suite.modalities.text.metrics.fluency import words_of

WINDOW = 4
"""Words back in which a word counts as repeated."""


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a share of all n-grams of all texts; 0 if there is none."""
    grams = [tuple(w[k : k + n]) for w in map(words_of, texts) for k in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def repetition(texts: Sequence[str], window: int = WINDOW) -> float:
    """Share of words that stand among the `window` words before them in the same text."""
    repeated = total = 0
    for words in map(words_of, texts):
        repeated += sum(word in words[max(0, k - window) : k] for k, word in enumerate(words))
        total += len(words)
    return repeated / max(1, total)
