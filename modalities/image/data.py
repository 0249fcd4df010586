"""The image training set as one self-contained file: lossless pictures, encoded captions, names and sources.

`prepare` makes it from public archives; `load` reads it. Training then needs neither the archives nor the text
encoder, so the file can be carried to a machine that has no network.

The container is a safetensors file:
    pictures         uint8 [bytes]   lossless WebP, one after the other; `picture_offsets` int64 [N + 1]
    picture_styles   uint8 [N]       index into the metadata's `styles`
    caption_codes    uint8 [bytes]   deflated int8 [tokens, 384], without padding; `caption_scales` float16 [tokens]
    caption_offsets  int64 [C + 1]   in tokens; caption 0 is the empty prompt
    caption_owners   int32 [C]       the picture that a caption tells of, -1 for the empty prompt
and, under the one metadata key `suite`, JSON with names, captions, styles and sources.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image.sources import KEYWORDS, NAMES, STYLES, Record, Style, emoji_names
from suite.modalities.shared.fetch import Archive, cache_dir, digest, fetch
from suite.modalities.shared.text_encoder import WIDTH, TokenStates, encode

FORMAT = 1
LIMIT = 40 * 2**20
"""Bytes that a container may have."""
LENGTH = 24
"""Tokens a caption at most."""
_LEVELS = (127, 63, 31, 20)

T = TypeVar("T")
Encoder = Callable[[Sequence[str], int], TokenStates]


@dataclass(frozen=True)
class ImageData:
    """Captioned pictures in memory.

    `pictures` uint8 [N, 3, S, S]; `names` and `styles` one a picture; `captions` C texts, the first of them empty;
    `owners` int64 [C], the picture of a caption (-1 for the empty one). Token states stay quantised: see `states`.
    """

    pictures: Tensor
    names: tuple[str, ...]
    styles: tuple[str, ...]
    captions: tuple[str, ...]
    owners: Tensor
    about: Mapping[str, Any]
    codes: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)
    offsets: Tensor = field(repr=False)

    def __len__(self) -> int:
        return self.pictures.shape[0]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.pictures.shape[-1]

    def states(self, captions: Tensor | Sequence[int], length: int = LENGTH) -> TokenStates:
        """Token states of the captions with these indices, padded with zeros to `length`; 0 is the null condition."""
        index = torch.as_tensor(captions, dtype=torch.long)
        begin, end = self.offsets[index], self.offsets[index + 1]
        position = begin[:, None] + torch.arange(length)
        mask = position < end[:, None]
        position = position.clamp(max=self.codes.shape[0] - 1)
        states = self.codes[position].float() * self.scales[position].float()[..., None]
        return TokenStates(states * mask[..., None], mask.float())

    def captions_of(self) -> Tensor:
        """Caption indices int64 [N, K], K the most that a picture has; pictures with fewer repeat theirs."""
        lists: list[list[int]] = [[] for _ in range(len(self))]
        for caption, owner in enumerate(self.owners.tolist()):
            if owner >= 0:
                lists[owner].append(caption)
        most = max(len(found) for found in lists)
        return torch.tensor([[found[k % len(found)] for k in range(most)] for found in lists])


def prepare(
    cache: Path | None = None,
    size: int = 64,
    styles: Sequence[str] = ("3d", "flat"),
    captions: int = 4,
    out: Path | None = None,
    encoder: Encoder = encode,
    table: Mapping[str, Style] = STYLES,
    names: tuple[Archive, Archive] = (NAMES, KEYWORDS),
    limit: int = LIMIT,
) -> Path:
    """Fetch the sources, join, caption, encode, and write `image-<size>.safetensors`; returns its path.

    `cache` holds the archives (default `cache_dir()`), `out` is the folder of the result (default `cache`).
    Same sources and same package versions give the same bytes. Raises ConfigError for an unknown style, a source
    that gives fewer pictures than it must, or a result larger than `limit` bytes.
    """
    if unknown := [style for style in styles if style not in table]:
        raise ConfigError(f"Unknown style {unknown[0]!r}: choose from {', '.join(table)}")
    if not styles or size < 8:
        raise ConfigError(f"Got size {size} and styles {list(styles)}: expected 8 pixels or more and one style or more")
    folder = cache_dir() if cache is None else Path(cache)
    say = Console(stderr=True).print
    paths = {archive: fetch(archive, folder, say) for archive in (*names, *(table[s].archive for s in styles))}
    emoji = emoji_names(paths[names[0]], paths[names[1]])
    records: list[Record] = []
    for style in styles:
        wanted = table[style]
        found = list(_track(wanted.read(paths[wanted.archive], size, emoji), f"Reading {style}", wanted.expected))
        if len(found) < wanted.expected:
            raise ConfigError(
                f"{wanted.archive.name} gave {len(found)} pictures of style {style!r}, expected {wanted.expected}: "
                f"the archive or a table of names differs from the expected one. Delete {folder} to fetch anew"
            )
        records += found
    sources = [
        {"name": a.name, "version": a.version, "licence": a.licence, "client": a.client, "sha256": digest(path)}
        for a, path in paths.items()
    ]
    target = (folder if out is None else Path(out)) / f"image-{size}.safetensors"
    return write(target, records, caption_list(records, table, captions), sources, encoder, limit)


def caption_list(
    records: Sequence[Record], table: Mapping[str, Style] = STYLES, most: int = 4
) -> list[tuple[int, str]]:
    """(picture, caption) pairs, up to `most` (1 to 4) a picture.

    In order: the name; the name with an article; the name with two keywords; with three. Every second caption of a
    style with `optional_phrase`, and every caption of the others, ends with the style, so that a prompt may name it.
    """
    if not 1 <= most <= 4:
        raise ConfigError(f"captions is {most}, expected 1 to 4")
    rng = random.Random(0)
    pairs: list[tuple[int, str]] = []
    for picture, record in enumerate(records):
        name = record.name.replace("\u2019", "'").lower()
        words = [w.replace("_", " ").replace("\xa0", " ") for w in record.keywords if len(w) > 2 and w.isascii()]
        texts = [name, f"{'an' if name[0] in 'aeiou' else 'a'} {name}"]
        if words:
            for count in (2, 3):
                rng.shuffle(words)
                texts.append(f"{name}, {', '.join(words[:count])}")
        style = table[record.style]
        for k, text in enumerate(texts[:most]):
            bare = style.optional_phrase and k % 2 == 0
            pairs.append((picture, text if bare else f"{text}, {style.phrase}"))
    return pairs


def write(
    target: Path,
    records: Sequence[Record],
    pairs: Sequence[tuple[int, str]],
    sources: Sequence[Mapping[str, Any]],
    encoder: Encoder = encode,
    limit: int = LIMIT,
) -> Path:
    """Write the container of these pictures and captions to `target`, atomically.

    Token states get the finest of a few quantisers with which the file stays within `limit` bytes.
    """
    texts = ["", *(text for _, text in pairs)]
    pictures = [_webp(record.pixels) for record in _track(records, "Packing pictures", len(records))]
    states, lengths = _encode_all(texts, encoder)
    styles = list(dict.fromkeys(record.style for record in records))
    tensors = {
        "pictures": torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8),
        "picture_offsets": _offsets([len(p) for p in pictures]),
        "picture_styles": torch.tensor([styles.index(r.style) for r in records], dtype=torch.uint8),
        "caption_offsets": _offsets(lengths),
        "caption_owners": torch.tensor([-1, *(picture for picture, _ in pairs)], dtype=torch.int32),
    }
    about: dict[str, Any] = {
        "format": FORMAT,
        "size": records[0].pixels.shape[0],
        "styles": styles,
        "names": [r.name for r in records],
        "captions": texts,
        "sources": list(sources),
    }
    content = b""
    for levels in _LEVELS:
        codes, scales, error = quantise(states, levels)
        tensors["caption_codes"] = torch.frombuffer(bytearray(_deflate(codes)), dtype=torch.uint8)
        tensors["caption_scales"] = scales
        about["states"] = {"tokens": len(states), "levels": levels, "relative_error": round(error, 5)}
        content = save(tensors, {"suite": json.dumps(about, ensure_ascii=False, sort_keys=True)})
        if len(content) <= limit:
            break
    else:
        raise ConfigError(
            f"{len(records)} pictures with {len(pairs)} captions take {len(content) / 2**20:.1f} MiB, more than "
            f"{limit / 2**20:.1f}: ask for fewer styles, fewer captions a picture, or a smaller size"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def load(path: Path | str) -> ImageData:
    """Read a container. Raises ConfigError when it is absent, cut short, or of another format."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no training set {path}. Type: suite data prepare image")
    try:
        with safe_open(path, "pt") as box:
            about = json.loads((box.metadata() or {}).get("suite", "{}"))
            if about.get("format") != FORMAT:
                raise ConfigError(f"{path} has format {about.get('format')}, expected {FORMAT}: prepare it again")
            tensors = {name: box.get_tensor(name) for name in box.keys()}
        blob, bounds = tensors["pictures"].numpy().tobytes(), tensors["picture_offsets"].tolist()
        pictures = np.stack([_pixels(blob[a:b]) for a, b in itertools.pairwise(bounds)])
        codes = np.frombuffer(zlib.decompress(tensors["caption_codes"].numpy().tobytes(), wbits=-15), np.int8)
    except (SafetensorError, KeyError, ValueError, OSError, zlib.error) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): delete it and prepare it again with: suite data prepare image"
        ) from error
    return ImageData(
        pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        names=tuple(about["names"]),
        styles=tuple(about["styles"][i] for i in tensors["picture_styles"].tolist()),
        captions=tuple(about["captions"]),
        owners=tensors["caption_owners"].long(),
        about=about,
        codes=torch.from_numpy(codes.reshape(-1, WIDTH).copy()),
        scales=tensors["caption_scales"],
        offsets=tensors["caption_offsets"],
    )


def quantise(states: Tensor, levels: int = 127) -> tuple[Tensor, Tensor, float]:
    """Rows [T, C] -> int8 codes [T, C] within +-levels, float16 scales [T], relative root-mean-square error.

    Row ~ code x scale: every row is scaled by its own largest value.
    """
    scales = (states.abs().amax(dim=1) / levels).clamp(min=1e-7).half()
    codes = (states / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    residual = (codes.float() * scales.float()[:, None] - states).square().mean().sqrt()
    return codes, scales, float(residual / states.square().mean().sqrt().clamp(min=1e-12))


def _encode_all(texts: Sequence[str], encoder: Encoder, batch: int = 256) -> tuple[Tensor, list[int]]:
    """Token states [T, 384] of all texts without padding, and the number of tokens of each."""
    rows, lengths = [], []
    for start in _track(range(0, len(texts), batch), "Encoding captions", -(-len(texts) // batch)):
        found = encoder(texts[start : start + batch], LENGTH)
        rows.append(found.states[found.mask.bool()])
        lengths += found.mask.sum(dim=1).long().tolist()
    return torch.cat(rows), lengths


def _deflate(codes: Tensor) -> bytes:
    # Codes have no repeats to find, only a narrow distribution: Huffman coding alone is as small and far faster.
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(codes.numpy().tobytes()) + packer.flush()


def _webp(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def _pixels(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _track(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return track(items, what, total=total, console=console, transient=True, disable=not console.is_terminal)
