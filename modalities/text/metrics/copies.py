"""How much of what is written stands in the training texts: whole texts, and runs of words.

python -m suite.modalities.text.metrics.copies DATA TEXTS.jsonl      # what `suite text @FILE -o TEXTS.jsonl` wrote
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from suite.modalities.text.metrics.fluency import words_of

RUN = 6
"""Words in a row that are counted as taken from a training text."""


@dataclass(frozen=True)
class Copies:
    """`whole`: share of texts whose words are those of a training text; `runs`: share that have `RUN` words in a row
    of one; `long`: share of texts that are long enough for that."""

    whole: float
    runs: float
    long: float


def copies(texts: Sequence[str], training: Iterable[str]) -> Copies:
    """Compared by words alone: case, digits and punctuation do not count. Texts of fewer than three words are left
    out of `whole`: whoever writes short definitions meets them by chance."""
    wholes: set[tuple[str, ...]] = set()
    runs: set[tuple[str, ...]] = set()
    for text in training:
        words = words_of(text)
        wholes.add(tuple(words))
        runs.update(_runs(words))
    made = [words_of(text) for text in texts]
    whole = sum(len(words) >= 3 and tuple(words) in wholes for words in made)
    run = sum(any(r in runs for r in _runs(words)) for words in made)
    count = max(1, len(made))
    return Copies(whole / count, run / count, sum(len(words) >= RUN for words in made) / count)


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[k : k + RUN]) for k in range(len(words) - RUN + 1)]


def training_texts(file: Path) -> list[str]:
    """The texts of a prepared training file that training may look at."""
    from tokenizers import Tokenizer

    from suite.modalities.text.data import load
    from suite.modalities.text.vocabulary import written

    data = load(file)
    tokenizer = Tokenizer.from_str(data.tokenizer)
    rows = data.tokens.tensor_split(data.offsets[1:-1])
    return [written(tokenizer, row.tolist()) for row, held in zip(rows, data.held_out, strict=True) if not held]


def main(arguments: Sequence[str]) -> None:
    """`python -m ... DATA TEXTS.jsonl`."""
    if len(arguments) != 2:
        raise SystemExit("expected two arguments: what `suite data prepare text` made, and a .jsonl of texts")
    lines = Path(arguments[1]).read_text(encoding="utf-8").splitlines()
    print(json.dumps(asdict(copies([json.loads(line)["text"] for line in lines], training_texts(Path(arguments[0]))))))


if __name__ == "__main__":
    main(sys.argv[1:])
