"""Perplexity under a language model that is not ours: the English trigrams that pocketsphinx carries."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from suite.errors import ConfigError

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


@dataclass(frozen=True)
class Fluency:
    """`perplexity` per known word with the ends of texts, `oov` the share of words left out, `words` all of them."""

    perplexity: float
    oov: float
    words: int


def words_of(text: str) -> list[str]:
    """Lower-case words; punctuation and digits are dropped, hyphens part words."""
    return _WORD.findall(text.lower())


def perplexity(texts: Sequence[str]) -> Fluency:
    """exp of the mean negative log-likelihood over all known words and text ends of `texts`.

    A word that the model does not know is left out and counted in `oov`; what follows it is judged without it, as
    at the start of a history. Read both numbers together: a text of invented words has few words left to judge.
    Raises ConfigError when pocketsphinx is absent.
    """
    score, known, unknown = 0.0, 0, 0
    for text in texts:
        history = ["<s>"]
        for word in [*words_of(text), "</s>"]:
            nats = _log_probability(word, history)
            if nats is None:
                unknown += 1
                history = []
                continue
            score, known = score + nats, known + 1
            history = [*history, word][-2:]
    total = known + unknown
    return Fluency(math.exp(-score / max(1, known)), unknown / max(1, total - len(texts)), total - len(texts))


def _log_probability(word: str, history: Sequence[str]) -> float | None:
    """ln p(word | up to two words before), or None for a word that the model does not know."""
    model, scale, nothing = _trigrams()
    value = model.prob([word, *reversed(history)])
    return None if value <= nothing else float(scale.log_to_ln(value))


@lru_cache(maxsize=1)
def _trigrams() -> tuple[Any, Any, int]:
    """The model, its scale of logarithms, and the number that stands for log 0."""
    try:
        from pocketsphinx import Config, LogMath, NGramModel, get_model_path
    except ImportError:
        raise ConfigError(
            "the perplexity of texts needs pocketsphinx, which is not installed. "
            "Type: pip install 'efficient-diffusion-suite[metrics]'"
        ) from None
    scale = LogMath()
    return NGramModel(Config(), scale, get_model_path("en-us/en-us.lm.bin")), scale, scale.get_zero()
