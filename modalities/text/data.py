"""The text training set as one self-contained file: tokens, prompts, the tokenizer, and a vector for each token.

`prepare` makes it from public archives; `load` reads it. Training then needs neither the archives nor a text
encoder, so the file can be carried to a machine that has no network.

The container is a safetensors file:
    text_tokens     uint16 [tokens]   all texts, one after the other; `text_offsets` int32 [N + 1]
    text_kinds      uint8 [N]         index into `sources.KINDS`
    text_held_out   uint8 [N]         1 where training must not look: every synonym's text of a held-out prompt
    prompt_tokens   uint16 [tokens]   all prompts; `prompt_offsets` int32 [P + 1], `prompt_texts` int32 [P]
    token_vectors   float16 [V, 384]  MiniLM's sentence vector of each token's letters: a start for embeddings;
                                      none of word pieces, whose embeddings MiniLM has itself
and, under the one metadata key `suite`, JSON with the tokenizer, how many of its tokens a text may have, the kinds and
the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.shared import container
from suite.modalities.shared.container import LIMIT
from suite.modalities.shared.fetch import cache_dir, digest, fetch
from suite.modalities.text import pieces
from suite.modalities.text.sources import KINDS, SOURCES, Record, Source
from suite.modalities.text.vocabulary import PROMPT, SPECIAL

FORMAT = 2
LONGEST = 63
"""Tokens of a text at most; longer ones are left out. One place of 64 is for the end."""
_HELD_OUT = 50
"""One prompt in so many is held out."""

Vectors = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class TextData:
    """Texts and prompts as tokens.

    `tokens`, `offsets`, `kinds`, `held_out`: see the head of this file; `prompt_*` likewise, with `prompt_texts` the
    text that each prompt asks for, in the order of the texts. Texts have the first `outputs` tokens alone.
    """

    tokens: Tensor
    offsets: Tensor
    kinds: Tensor
    held_out: Tensor
    prompt_tokens: Tensor
    prompt_offsets: Tensor
    prompt_texts: Tensor
    vectors: Tensor
    tokenizer: str = field(repr=False)
    outputs: int
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, without the end."""
        return self.offsets[1:] - self.offsets[:-1]


def prepare(
    cache: Path | None = None,
    size: int | None = None,
    out: Path | None = None,
    sources: Sequence[Source] = SOURCES,
    vectors: Vectors | None = None,
    limit: int = LIMIT,
) -> Path:
    """Fetch the sources, encode, and write `text-pieces.safetensors`: MiniLM's word pieces (`text.pieces`).

    With `size` a byte-level BPE of so many tokens is trained instead, for models that start from nothing, and the file
    is `text-<size>.safetensors`. Held out are also the texts that the metrics compare with. `cache` holds the archives
    (default `cache_dir()`), `out` is the folder of the result (default `cache`).
    Raises ConfigError when a source gives fewer records than it must, or the result is larger than `limit` bytes.
    """
    if size is not None and not 512 <= size <= 2**16:
        raise ConfigError(f"size is {size}: expected a vocabulary of 512 to 65536 tokens")
    folder = cache_dir() if cache is None else Path(cache)
    say = Console(stderr=True).print
    records: list[Record] = []
    origins = {}
    for source in sources:
        path = fetch(source.archive, folder, say)
        found = list(source.read(path))
        if len(found) < source.expected:
            raise ConfigError(
                f"{source.archive.name} gave {len(found)} texts, expected {source.expected}: the archive differs "
                f"from the expected one. Delete {path} to fetch it anew"
            )
        records += found
        origins[source.archive.name] = {
            "name": source.archive.name,
            "version": source.archive.version,
            "licence": source.archive.licence,
            "client": source.archive.client,
            "sha256": digest(path),
        }
    from suite.modalities.text.metrics.reference import load_real

    target = (folder if out is None else Path(out)) / f"text-{size or 'pieces'}.safetensors"
    reserved = frozenset(load_real().texts)
    return write(target, records, size, list(origins.values()), vectors or sentence_vectors, limit, reserved)


def write(
    target: Path,
    records: Sequence[Record],
    size: int | None,
    sources: Sequence[Mapping[str, Any]],
    vectors: Vectors,
    limit: int = LIMIT,
    reserved: frozenset[str] = frozenset(),
) -> Path:
    """Write the container of these records to `target`, atomically, without texts of more than `LONGEST` tokens.

    `size` is as in `prepare`; `reserved` are texts to hold out besides every fiftieth.
    """
    if size is None:
        said, outputs = pieces.make(r.text for r, held in zip(records, held_out(records), strict=True) if not held)
        tokenizer = Tokenizer.from_str(said)
        reading = pieces.only(tokenizer, outputs)
    else:
        reading = tokenizer = train_tokenizer(records, size)
        outputs = tokenizer.get_vocab_size()
    coded = [e.ids for e in reading.encode_batch([r.text for r in records], add_special_tokens=False)]
    # A piece that no text may have stands for a character that the encoder does not know.
    fits = [k for k, ids in enumerate(coded) if len(ids) <= LONGEST and max(ids, default=0) < outputs]
    records, coded = [records[k] for k in fits], [coded[k] for k in fits]
    owners = [k for k, r in enumerate(records) for _ in r.prompts]
    tokenizer.enable_truncation(PROMPT)  # a mark at the end stays
    prompts = [e.ids for e in tokenizer.encode_batch([p for r in records for p in r.prompts])]
    tokenizer.no_truncation()
    held = [one or r.text in reserved for one, r in zip(held_out(records), records, strict=True)]
    words = [str(tokenizer.id_to_token(k)) for k in range(outputs if size else 0)]
    tensors = {
        "text_tokens": _flat(coded),
        "text_offsets": _offsets(coded),
        "text_kinds": torch.tensor([r.kind for r in records], dtype=torch.uint8),
        "text_held_out": torch.tensor(held, dtype=torch.uint8),
        "prompt_tokens": _flat(prompts),
        "prompt_offsets": _offsets(prompts),
        "prompt_texts": torch.tensor(owners, dtype=torch.int32),
        "token_vectors": vectors([w.replace("Ġ", " ").strip() or w for w in words]).half(),
    }
    about = {"format": FORMAT, "kinds": KINDS, "sources": list(sources), "tokenizer": tokenizer.to_str(),
             "outputs": outputs}  # fmt: skip
    content = container.packed(tensors, about)
    if len(content) > limit:
        raise container.too_large(f"{len(records)} texts", len(content), limit)
    return container.put(target, content)


def held_out(records: Sequence[Record]) -> list[bool]:
    """Which texts are held out: one definition in `_HELD_OUT`, one passage in as many, spread evenly.

    A word with several meanings may be a prompt of training texts too: what is held out is the text.
    """
    return [k % _HELD_OUT == 0 for k in range(len(records))]


def train_tokenizer(records: Sequence[Record], size: int) -> Tokenizer:
    """Byte-level BPE over lower-case text, trained on the texts and the prompts; `SPECIAL` are its first tokens."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def corpus() -> Iterator[str]:
        for record in records:
            yield record.text
            yield from record.prompts[:2]

    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def sentence_vectors(texts: Sequence[str]) -> Tensor:
    """MiniLM's sentence vectors [N, 384]: the mean of the token states, of length 1."""
    from suite.modalities.shared.text_encoder import WIDTH, encode

    rows = [torch.zeros(0, WIDTH)]
    for start in range(0, len(texts), 512):
        found = encode(texts[start : start + 512], 12)
        rows.append(found.states.sum(1) / found.mask.sum(1, keepdim=True))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def load(path: Path | str) -> TextData:
    """Read a container. Raises ConfigError when it is absent, cut short, or of another format."""
    path = Path(path)
    about, tensors = container.read(path, "text", FORMAT)
    with container.whole(path, "text"):
        return TextData(
            tokens=tensors["text_tokens"].long(),
            offsets=tensors["text_offsets"].long(),
            kinds=tensors["text_kinds"].long(),
            held_out=tensors["text_held_out"].bool(),
            prompt_tokens=tensors["prompt_tokens"].long(),
            prompt_offsets=tensors["prompt_offsets"].long(),
            prompt_texts=tensors["prompt_texts"].long(),
            vectors=tensors["token_vectors"].float(),
            tokenizer=about["tokenizer"],
            outputs=int(about["outputs"]),
            about={k: v for k, v in about.items() if k != "tokenizer"},
        )


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int32).to(torch.uint16)


def _offsets(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int32).cumsum(0).to(torch.int32)
