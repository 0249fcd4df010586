"""MiniLM's word pieces as a vocabulary: those that the texts use come first, and only they can be written.

A model that starts from the sentence encoder keeps its pieces and their embeddings, which the installed package holds,
so that neither has to ship. The order is new: the four special tokens, then the pieces that the texts have often
enough, then all others, which prompts alone may have. A network so scores its first `outputs` tokens and no more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.modalities.shared.words import encoder_folder
from suite.modalities.text.vocabulary import SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

BEGIN = "[CLS]"
"""What a prompt begins with, as the encoder has learned; it ends with the first of `SPECIAL`."""
_THEIRS = ("[SEP]", "[MASK]", "[unused0]")
"""Whose embeddings the tokens `SPECIAL` start from: the end of a text, the mask, nothing."""
_UNKNOWN = "[UNK]"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
"""The tensor of transformers' classes that is not saved."""


def make(texts: Iterable[str], least: int = 5) -> tuple[str, int]:
    """(tokenizer as JSON, number of outputs): pieces that stand `least` times in `texts`, and all single characters."""
    from tokenizers import Tokenizer

    content = _theirs()
    theirs = Tokenizer.from_str(json.dumps(content))
    counts: Counter[int] = Counter()
    for found in theirs.encode_batch(list(texts), add_special_tokens=False):
        counts.update(found.ids)
    names = [name for name, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1])]
    first = [*_THEIRS, BEGIN]
    letters = {prefix + c for prefix in ("", "##") for c in ascii_lowercase + digits}
    kept = [n for k, n in enumerate(names) if n not in (*first, _UNKNOWN) and (counts[k] >= least or n in letters)]
    others = sorted(set(names) - {*first, *kept}, key=names.index)
    order = [*SPECIAL, BEGIN, *kept, *others]
    return json.dumps(_renamed(content, order)), len(first) + len(kept)


def _theirs() -> dict[str, Any]:
    """The encoder's tokenizer as plain data, without padding and cutting."""
    content = json.loads((encoder_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    return {**content, "padding": None, "truncation": None}


def _renamed(content: Mapping[str, Any], order: list[str]) -> dict[str, Any]:
    ids = {name: k for k, name in enumerate(order)}
    special = [*SPECIAL, BEGIN, _UNKNOWN]
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (BEGIN, SPECIAL[0]))
    words = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        **content,
        "added_tokens": sorted(({"id": ids[n], "content": n, **entry} for n in special), key=lambda e: e["id"]),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, words, end],
            "pair": [begin, words, end, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in (BEGIN, SPECIAL[0])},
        },
        "model": {**content["model"], "vocab": ids},
    }


def only(tokenizer: Tokenizer, outputs: int) -> Tokenizer:
    """The same tokenizer with the first `outputs` tokens alone: rarer words fall into pieces that can be written."""
    return _only(tokenizer.to_str(), outputs)


@lru_cache(maxsize=8)
def _only(said: str, outputs: int) -> Tokenizer:
    from tokenizers import Tokenizer

    content = json.loads(said)
    vocab = {name: k for name, k in content["model"]["vocab"].items() if k < outputs or name == _UNKNOWN}
    tokenizer = Tokenizer.from_str(json.dumps({**content, "model": {**content["model"], "vocab": vocab}}))
    tokenizer.encode_special_tokens = True  # as in `vocabulary`: no file says so
    return tokenizer


def table(tokenizer: Tokenizer) -> Tensor:
    """The encoder's embeddings [V, 384] float32 of the tokens, in their order.

    Raises:
        ConfigError: a token that the installed encoder does not have, or its package is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    theirs = _theirs()["model"]["vocab"]
    names = [str(tokenizer.id_to_token(k)) for k in range(tokenizer.get_vocab_size())]
    names[: len(SPECIAL)] = _THEIRS
    if missing := [name for name in names if name not in theirs]:
        raise ConfigError(f"the installed text encoder has no token {missing[0]!r}: the model is of another encoder")
    file = encoder_folder() / "model.safetensors"
    try:
        with safe_open(file, "pt") as box:
            rows = box.get_tensor(EMBEDDINGS.removeprefix("bert."))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read, the installation is damaged: {error}") from error
    return rows[torch.tensor([theirs[name] for name in names])].float()
