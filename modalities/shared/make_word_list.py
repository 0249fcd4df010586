"""Make `words.txt.gz`: the words of WordNet and of captions, sorted, one a line, in lower case.

    python -m suite.modalities.shared.make_word_list /usr/share/wordnet [CAPTIONS.safetensors ...]

The folder is that of Debian's package wordnet-base 1:3.0-37 (see `text.sources`); the other files are training sets or
the test data of any modality, whose captions or labels are read. Equal inputs give an equal file.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from suite.modalities.shared.word_list import FILE

PARTS = ("noun", "verb", "adj", "adv")
_WORD = re.compile(r"[^\W\d_]{2,}")


def lemmas(wordnet: Path) -> Iterator[str]:
    """Words of the lemmas, and irregular forms: "ice_cream" gives two, "mice" comes with "mouse"."""
    for part in PARTS:
        for line in (wordnet / f"index.{part}").read_text(encoding="ascii").splitlines():
            if not line.startswith("  "):  # the licence
                yield from _WORD.findall(line.partition(" ")[0])
        for line in (wordnet / f"{part}.exc").read_text(encoding="ascii").splitlines():
            yield from _WORD.findall(line)


def captions(file: Path) -> Iterator[str]:
    """Words of the captions, or of the labels, that a training set lists."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as stream:
        about = json.loads(stream.metadata()["suite"])
    for text in (*about.get("captions", ()), *about.get("labels", ())):
        yield from _WORD.findall(text.lower())


def main(wordnet: str, *files: str) -> None:
    words = set(lemmas(Path(wordnet))).union(*(captions(Path(file)) for file in files))
    content = "".join(f"{word}\n" for word in sorted(words) if word.isascii())
    FILE.write_bytes(gzip.compress(content.encode(), 9, mtime=0))
    print(f"{FILE}: {len(words)} words, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
