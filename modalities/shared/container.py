"""Training sets as one self-contained safetensors file: what all modalities' files have in common.

Tensors, and under the one metadata key `suite` JSON that says what they are; written whole or not at all.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from suite.errors import ConfigError
from suite.files.inputs import is_file
from suite.files.output import atomically
from suite.modalities.shared.captions import LEVELS, Encoder, bounds, deflate, encode_all, quantise

KEY = "suite"
MEBIBYTE = 2**20
LIMIT = 40 * MEBIBYTE
"""Bytes that a training set may have, so that it can be carried to another machine."""


def packed(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """The file's content; equal arguments give equal bytes."""
    return save(dict(tensors), {KEY: json.dumps(about, ensure_ascii=False, sort_keys=True)})


def put(target: Path, content: bytes) -> Path:
    """Write the content to `target`, whose folder is made; a crash leaves what was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomically(target) as temporary:
        temporary.write_bytes(content)
    return target


def put_captioned(
    target: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    texts: Sequence[str],
    encoder: Encoder,
    limit: int,
    what: str,
    advice: str = "",
) -> Path:
    """Write a training set with the token states of its texts, which `about` lists as `captions`.

    Token states get the finest of a few quantisers with which the file stays within `limit` bytes. Raises ConfigError
    when none does: `what` is in the file, and `advice` is what to ask for instead.
    """
    states, lengths = encode_all(texts, encoder)
    size = 0
    for levels in LEVELS:
        codes, scales, error = quantise(states, levels)
        captions = {
            "caption_codes": deflate(codes), "caption_scales": scales, "caption_offsets": bounds(lengths),
        }  # fmt: skip
        kept = {"tokens": len(states), "levels": levels, "relative_error": round(error, 5)}
        content = packed({**tensors, **captions}, {**about, "captions": list(texts), "states": kept})
        size = len(content)
        if size <= limit:
            return put(target, content)
    raise too_large(what, size, limit, advice)


def too_large(what: str, size: int, limit: int, advice: str = "") -> ConfigError:
    """The refusal of a file of more than `limit` bytes."""
    more = f": {advice}" if advice else ""
    return ConfigError(f"{what} take {size / MEBIBYTE:.1f} MiB, more than {limit / MEBIBYTE:.1f} MiB{more}")


def read(path: Path, modality: str, version: int, *needs: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says about itself, and its tensors.

    Raises ConfigError when it is absent, cut short, of another format, or says nothing about one of `needs`.
    """
    if not is_file(path):
        raise ConfigError(f"There is no training set {path}. Type: suite data prepare {modality}")
    with whole(path, modality):
        with safe_open(path, "pt") as box:
            about = json.loads((box.metadata() or {}).get(KEY, "{}"))
            if about.get("format") != version:
                raise ConfigError(f"{path} has format {about.get('format')}, expected {version}: prepare it again")
            if missing := [key for key in needs if key not in about]:
                raise ConfigError(f"{path} is no training set of {modality}, it says nothing about {missing[0]!r}")
            return about, {name: box.get_tensor(name) for name in box.keys()}


@contextmanager
def whole(path: Path | str, modality: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what unpacking a damaged file raises, and `more`, into a ConfigError that says how to get a whole one."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError, zlib.error, *more) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): delete it and prepare it again with: suite data prepare {modality}"
        ) from error
