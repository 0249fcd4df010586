"""Real texts that training never saw: what divergence is measured against, and the floor of every other number.

`weights/real.jsonl` has one held-out text a line with its kind and prompt; `weights/real.safetensors` their features.
To make them again: python -m suite.modalities.text.metrics.reference DATA
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from suite.errors import ConfigError
from suite.files.output import write, write_text
from suite.modalities.text.metrics.features import features
from suite.observe.finite import load_finite

FOLDER = Path(__file__).parent / "weights"
SHARES = {"definition": 0.65, "sentence": 0.1, "novel": 0.07, "speech": 0.18}
COUNT = 1000


@dataclass(frozen=True)
class Real:
    """Held-out texts: `texts`, `prompts` and `kinds` one by one, `features` [N, 384]."""

    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    features: Tensor = field(repr=False)

    def only(self, *kinds: str) -> Real:
        """Those of the given kinds."""
        keep = [k for k, kind in enumerate(self.kinds) if kind in kinds]
        texts, prompts, kinds = (tuple(column[k] for k in keep) for column in (self.texts, self.prompts, self.kinds))
        return Real(texts, prompts, kinds, self.features[keep])


@lru_cache(maxsize=1)
def load_real(folder: Path = FOLDER) -> Real:
    """The texts that ship. ConfigError when their files are damaged."""
    try:
        lines = [json.loads(line) for line in (folder / "real.jsonl").read_text(encoding="utf-8").splitlines()]
        found = load_finite(folder / "real.safetensors")["features"].float()
        texts, prompts, kinds = (tuple(line[key] for line in lines) for key in ("text", "prompt", "kind"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"the reference texts in {folder} are damaged ({error}): install the suite again") from error
    return Real(texts, prompts, kinds, torch.nn.functional.normalize(found, dim=1))


def make(data: Path, folder: Path = FOLDER, count: int = COUNT) -> Path:
    """Choose `count` held-out texts of the training file `data` by `SHARES`, spread evenly, and write both files."""
    from tokenizers import Tokenizer

    from suite.modalities.text.data import load
    from suite.modalities.text.sources import KINDS

    texts = load(data)
    tokenizer = Tokenizer.from_str(texts.tokenizer)

    def decode(tokens: Tensor, offsets: Tensor, k: int) -> str:
        return tokenizer.decode(tokens[offsets[k] : offsets[k + 1]].tolist()).strip()

    lines = []
    first = torch.bincount(texts.prompt_texts, minlength=len(texts)).cumsum(0).roll(1)
    first[0] = 0
    for kind, name in enumerate(KINDS):
        here = (texts.held_out & (texts.kinds == kind)).nonzero()[:, 0]
        chosen = here[torch.linspace(0, len(here) - 1, min(len(here), round(count * SHARES[name]))).long()]
        for k in chosen.tolist():
            last = int(first[k + 1]) - 1 if k + 1 < len(texts) else len(texts.prompt_offsets) - 2
            # The first prompt of a definition is its usual word; the last of a passage has the most keywords.
            prompt = decode(texts.prompt_tokens, texts.prompt_offsets, int(first[k]) if kind < 2 else last)
            lines.append({"text": decode(texts.tokens, texts.offsets, k), "prompt": prompt, "kind": name})
    folder.mkdir(parents=True, exist_ok=True)
    rows = features([line["text"] for line in lines])
    write_text(folder / "real.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "real.safetensors", lambda made: save_file({"features": rows.half().contiguous()}, made))
    return folder


def main(arguments: Sequence[str]) -> None:
    """`python -m ... DATA`."""
    if len(arguments) != 1:
        raise SystemExit("expected one argument, the file that `suite data prepare text` made")
    print(make(Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
