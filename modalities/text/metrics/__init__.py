"""Quality of texts: fluency, variety, closeness to real texts, agreement with the prompts.

Needs the extras `metrics` and `text`; nothing is fetched. `weights/README.md` is the card of what ships.
"""

from __future__ import annotations

from collections.abc import Sequence

from suite.errors import ConfigError
from suite.modalities.text.metrics.divergence import mauve as mauve
from suite.modalities.text.metrics.features import features as features
from suite.modalities.text.metrics.fluency import perplexity as perplexity
from suite.modalities.text.metrics.reference import Real as Real
from suite.modalities.text.metrics.reference import load_real as load_real
from suite.modalities.text.metrics.relevance import relevance as relevance
from suite.modalities.text.metrics.retrieval import retrieval as retrieval
from suite.modalities.text.metrics.variety import distinct as distinct
from suite.modalities.text.metrics.variety import repetition as repetition

LEAST = 8
"""Texts below which a comparison of sets means nothing."""


def evaluate(texts: Sequence[str], prompts: Sequence[str], real: Real | None = None) -> dict[str, float]:
    """All text metrics of `texts`, made from `prompts` one by one, at least `LEAST` of them.

    Reference: the held-out real texts that ship, or `real`.
    Returns:
        perplexity: under pocketsphinx's English trigrams, per known word, ends of texts included; lower is better.
        oov: share of words that the trigram model does not know; they are left out of the perplexity.
        distinct_1, distinct_2, distinct_3: different n-grams as a share of all n-grams; falls with more texts.
        repetition: share of words that repeat one of the four words before them; lower is better.
        empty: share of texts without a word.
        words: mean words of a text.
        mauve: 0 to 1, higher is better; see `divergence`. Compare at equal numbers of texts.
        blind_r1, blind_r5: share of texts that without their prompt's own words are nearest to it of all prompts here,
            or among its nearest five; compare at equal prompts. headword: share of texts with a word of their prompt.
        relevance: mean cosine of text and prompt; relevance_shuffled: the same with prompts of other texts.
        relevance_stderr: of their difference.
        n: number of texts.
    """
    if len(texts) != len(prompts):
        raise ConfigError(f"got {len(texts)} texts and {len(prompts)} prompts; expected one prompt a text")
    if len(texts) < LEAST:
        raise ConfigError(f"got {len(texts)} texts; expected {LEAST} or more, as sets of texts are compared")
    fluency = perplexity(texts)
    found = features(texts)
    own = relevance(found, prompts)
    blind = retrieval(texts, prompts)
    reference = load_real() if real is None else real
    return {
        "perplexity": fluency.perplexity,
        "oov": fluency.oov,
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition": repetition(texts),
        "empty": sum(not t.strip() for t in texts) / len(texts),
        "words": sum(len(t.split()) for t in texts) / len(texts),
        "mauve": mauve(found, reference.features),
        "blind_r1": blind.first,
        "blind_r5": blind.fifth,
        "headword": blind.headword,
        "relevance": own.matched,
        "relevance_shuffled": own.shuffled,
        "relevance_stderr": own.stderr,
        "n": float(len(texts)),
    }
