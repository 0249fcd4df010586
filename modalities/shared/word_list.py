"""English words: WordNet's and those of the captions, about 93,000, and forms of them. No torch; a few milliseconds.

`make_word_list` makes the file. Words of the text encoder's own vocabulary are not in it for their own sake.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("words.txt.gz")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Endings of forms -> those of their lemmas, as WordNet's `morphy` detaches them.
ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"),
    ("est", "e"), ("ly", ""), ("ish", ""),
)  # fmt: skip


def listed(word: str) -> bool:
    """Whether a word, in lower case, is on the list as it stands."""
    text, wanted = _text(), word.encode()
    low, high = 0, len(text)  # both at the beginning of a line, or behind the last
    while low < high:
        begin = text.rfind(b"\n", low, (low + high) // 2) + 1 or low
        end = text.index(b"\n", begin)
        if (found := text[begin:end]) == wanted:
            return True
        low, high = (end + 1, high) if found < wanted else (low, begin)
    return False


def is_word(word: str) -> bool:
    """Whether a word, in lower case, is on the list or a regular form of one that is."""
    return listed(word) or any(listed(base) for base in _bases(word))


def near(word: str) -> list[str]:
    """Listed words one edit away: a letter left out, put in, changed, or swapped with the next."""
    parts = [(word[:k], word[k:]) for k in range(len(word) + 1)]
    edits = {a + b[1:] for a, b in parts if b}
    edits |= {a + b[1] + b[0] + b[2:] for a, b in parts if len(b) > 1}
    edits |= {a + c + b[1:] for a, b in parts if b for c in LETTERS}
    edits |= {a + c + b for a, b in parts for c in LETTERS}
    return sorted(edit for edit in edits - {word} if len(edit) > 2 and listed(edit))


def _bases(word: str) -> Iterator[str]:
    for ending, instead in ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 1:
            yield stem + instead
            if stem[-1:] == stem[-2:-1]:  # running, hotter
                yield stem[:-1]


@lru_cache(maxsize=1)
def _text() -> bytes:
    # Searched as it is: to make a set of it takes six times as long as to unpack it.
    return gzip.decompress(FILE.read_bytes())
