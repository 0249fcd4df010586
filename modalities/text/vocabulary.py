"""What the text models read and write: special tokens, the tokenizer, prompts and lengths. No torch here."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.files.inputs import TEXT, check
from suite.modalities.shared.words import check_words
from suite.modalities.text.sources import plain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from suite.host.models import ModelFolder
    from suite.request import Request

PAD, MASK, NONE = 0, 1, 2
"""The end of a text and everything after it; a token that is not known yet; the prompt that says nothing."""
SPECIAL = ("<pad>", "<mask>", "<none>")
ENCODER = "minilm"
"""What suite.json and training files call the sentence encoder, whose word pieces and embeddings a model may take."""
PROMPT = 12
"""Tokens of a prompt at most; training cuts longer ones."""
ASKED = re.compile(r"\((noun|verb|adjective|adverb)\)\s*$|^(sentence|novel|speech)\s*(:|$)")
"""A prompt as the training data write it; any other is taken for words that a sentence should be about."""


def read_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The model's own tokenizer. Raises ConfigError when the file is absent, damaged, or another model's."""
    file = folder.path / "tokenizer.json"
    check(file, "vocabulary", TEXT)
    try:
        found = file.stat()
        tokenizer = _opened(str(file), found.st_mtime_ns, found.st_size)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if [tokenizer.id_to_token(k) for k in range(len(SPECIAL))] != list(SPECIAL):
        raise ConfigError(f"{file} does not begin with {', '.join(SPECIAL)}")
    return tokenizer


@lru_cache(maxsize=8)
def _opened(file: str, changed: int, size: int) -> Tokenizer:
    """Read once for as long as the file stays: every request is checked with it, and reading takes a step's time."""
    from tokenizers import Tokenizer

    del changed, size
    tokenizer = Tokenizer.from_file(file)
    tokenizer.encode_special_tokens = True  # `<mask>` in a text is a word in brackets, not an open place
    return tokenizer


def lengths(folder: ModelFolder) -> tuple[int, int]:
    """Usual and largest room for a text, in tokens."""
    said = folder.fact("lengths")
    if not (isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)):
        raise ConfigError(f"model {folder.name}: lengths {said!r} in suite.json; expected [usual, most]")
    return said[0], said[1]


def start(folder: ModelFolder, tokenizer: Tokenizer, request: Request) -> tuple[int, list[int]]:
    """Room for the text, and the tokens with which it begins."""
    shortest, longest = lengths(folder)
    length = request.options.get("length")
    length = shortest if length is None else int(length)
    if length > longest:
        raise ConfigError(f"--length {length}: model {folder.name} writes at most {longest} tokens")
    words = plain(str(request.options.get("start") or ""))
    first = text_tokens(folder, tokenizer, words, "--start") if words else []
    if len(first) >= length:
        raise ConfigError(f"--start has {len(first)} tokens and --length is {length}: there is no room for more")
    return length, first


def given(folder: ModelFolder, tokenizer: Tokenizer, words: str, request: Request) -> list[int]:
    """Tokens of a text to begin with, and padding to its room."""
    length, first = start(folder, tokenizer, request)
    if first:
        raise ConfigError("--start and --init both say how the text begins; leave one of them out")
    tokens = text_tokens(folder, tokenizer, words, "--init")
    if len(tokens) > length:
        raise ConfigError(
            f"--init has {len(tokens)} tokens, and there is room for {length}; add --length {len(tokens)} "
            f"(the model {folder.name} writes at most {lengths(folder)[1]})"
        )
    return [*tokens, *[PAD] * (length - len(tokens))]


def text_tokenizer(folder: ModelFolder, tokenizer: Tokenizer) -> Tokenizer:
    """What reads a text, not a prompt: where the model writes only some of its tokens (`outputs`), these alone."""
    outputs = folder.facts.get("outputs")
    if outputs is None:
        return tokenizer
    from suite.modalities.text.pieces import only

    if not (type(outputs) is int and len(SPECIAL) < outputs <= tokenizer.get_vocab_size()):
        raise ConfigError(
            f"model {folder.name}: outputs {outputs!r} in suite.json; expected a number of its "
            f"{tokenizer.get_vocab_size()} tokens"
        )
    return only(tokenizer, outputs)


def text_tokens(folder: ModelFolder, tokenizer: Tokenizer, words: str, what: str) -> list[int]:
    """The tokens of a text that is given, without any marks. ConfigError for what the model cannot write."""
    found = text_tokenizer(folder, tokenizer).encode(words, add_special_tokens=False)
    unknown = tokenizer.token_to_id("[UNK]")
    for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
        if token == unknown:
            raise ConfigError(f"{what}: the model {folder.name} cannot write {words[begin:end]!r}; leave it out")
    return found.ids


def written(tokenizer: Tokenizer, row: list[int]) -> str:
    """The text of a row of tokens; punctuation stands as in the training texts, which word pieces do not keep."""
    text = tokenizer.decode(words_of(row)).strip()
    if not isinstance(tokenizer.model, _word_pieces()):
        return text
    for pattern, to in _SPACING:
        text = pattern.sub(to, text)
    return _QUOTED.sub(r'"\1"', text)


def _word_pieces() -> type:
    from tokenizers.models import WordPiece

    return WordPiece


_SPACING = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(?<=\w) - (?=\w)", "-"),
        (r"(?<=\w) ' (?=(s|t|d|m|ll|re|ve)\b)", "'"),
        (r"\( ", "("),
        (r" (?=[),.;:!?%])", ""),
        (r"(?<=\d)([.,]) (?=\d)", r"\1"),
        (r"(?<=\b[a-z]\.) (?=[a-z]\.)", ""),
        (r"(?<=\w) / (?=\w)", "/"),
        (r"\$ (?=\d)", "$"),
    )
)
_QUOTED = re.compile(r'" ([^"]*?) "')


def words_of(row: list[int]) -> list[int]:
    """The tokens of a text: up to the first padding after it has begun; padding in front of it says nothing."""
    begun = list(dropwhile(lambda token: token == PAD, row))
    return list(takewhile(lambda token: token != PAD, begun))


def asked(prompt: str) -> str:
    """The words of a prompt, without what says which kind of text is wanted."""
    wanted = plain(prompt)
    return ASKED.sub("", wanted).strip() or wanted


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt, in the form that the training data have; the empty one says nothing, in one token."""
    if not prompt:
        marks = tokenizer.encode("").ids  # word pieces have one at each end, byte pairs none
        return [*marks[:1], NONE, *marks[1:]]
    wanted = plain(prompt)
    check_words([asked(prompt)])
    if not ASKED.search(wanted):
        wanted = f"sentence: {wanted}"
    tokens = tokenizer.encode(wanted).ids
    if len(tokens) > PROMPT:
        raise ConfigError(f"the prompt {wanted!r} has {len(tokens)} tokens, the model reads {PROMPT}: shorten it")
    return tokens
