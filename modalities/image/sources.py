"""Captioned pictures out of public archives: Fluent 3D emoji, alone and composed, Noto emoji and Open Clip Art.

Every source gives `Record`s: a picture on white, its name, and keywords for richer captions. Skin-tone variants,
flags and lettered tiles are left out: the first are near-duplicates, the others cannot be drawn well at 64 px.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from suite.errors import ConfigError
from suite.modalities.shared.fetch import Archive, members

NAMES = Archive(
    "npm", "unicode-emoji-json", "0.9.0", "MIT", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401"
)
KEYWORDS = Archive(
    "npm", "emojilib", "4.0.3", "MIT", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"
)
FLUENT = Archive(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "MIT",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NOTO = Archive(
    "npm",
    "@iconify-json/noto",
    "1.2.9",
    "Apache-2.0",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
CLIPART = Archive(
    "apt",
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "public domain",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
)

GLASSES = {"glasses": "1f453", "sunglasses": "1f576-fe0f"}
_HEADS = (
    "cat face,dog face,fox,bear,panda,lion,tiger face,monkey face,pig face,rabbit face,mouse face,cow face,hamster,"
    "koala,wolf,robot,alien,grinning cat,grinning cat with smiling eyes,cat with wry smile,pouting cat,kissing cat,"
    "weary cat,cowboy hat face,clown face"
)
_DISCS = (
    "ghost,grinning face,beaming face with smiling eyes,grinning face with big eyes,smirking face,neutral face,"
    "expressionless face,angry face,crying face,slightly smiling face,slightly frowning face,face without mouth,"
    "hushed face"
)
FACES = dict.fromkeys(_HEADS.split(","), 0.47) | dict.fromkeys(_DISCS.split(","), 0.37)
"""How far below the top of a face, in its heights, its eyes are."""

SVG_SIZE = 128
"""Vector art is drawn at this size, or at the wanted size if that is larger, and then scaled down."""

_SUBJECTS = frozenset(
    "animals food plants people buildings transportation recreation tools electronics containers office "
    "education".split()
)
_OFF_SUBJECT = frozenset("cards roadsigns aiga flags".split())
_UNNAMED = frozenset("architetto rollandin con dei del della delle di e il la le per un una".split())
"""Words of titles that name the artist, or are not English."""


@dataclass(frozen=True)
class Record:
    """One picture: `pixels` uint8 [S, S, 3] on white; `name` and `keywords` as the source spells them."""

    style: str
    name: str
    keywords: tuple[str, ...]
    pixels: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Style:
    """A kind of picture: the archive that holds it, how many it must give, and how to read it.

    `read(path, size, names)` yields records; `names` is the table of `emoji_names`. `phrase` says the style in
    a caption; `optional_phrase` leaves it out of every second caption. `captions` is the most that a picture gets.
    """

    archive: Archive
    expected: int
    read: Callable[[Path, int, Mapping[str, Emoji]], Iterable[Record]]
    phrase: str
    optional_phrase: bool = False
    captions: int = 4


@dataclass(frozen=True)
class Emoji:
    """What the name and keyword tables say about one emoji."""

    name: str
    group: str
    keywords: tuple[str, ...]


def emoji_names(names: Path, keywords: Path) -> dict[str, Emoji]:
    """Emoji character (without variation selectors) -> `Emoji`, joined from the two archives."""
    table = {_plain(k): v for k, v in _json_member(names, r"data-by-emoji\.json$").items()}
    words = {_plain(k): v for k, v in _json_member(keywords, r"emoji-en-US\.json$").items()}
    # The first keyword repeats the name.
    return {k: Emoji(v["name"], v["group"], tuple(words.get(k, ())[1:])) for k, v in table.items()}


def read_fluent(path: Path, size: int, names: Mapping[str, Emoji]) -> Iterable[Record]:
    """The soft, glossy 3D pictures, in the order of their file names; 256 px before scaling."""
    pictures = {PurePosixPath(name).name: data for name, data in members(path, r"/assets/[^/]+\.webp$")}
    for name in sorted(pictures):
        if emoji := usable(name.removesuffix(".webp"), names):
            with Image.open(io.BytesIO(pictures[name])) as image:
                yield Record("3d", emoji.name, emoji.keywords, on_white(image, size))


def read_composed(path: Path, size: int, names: Mapping[str, Emoji]) -> Iterable[Record]:
    """Faces of the same 3D pictures that wear its glasses or its sunglasses, so that words are seen to combine."""
    pictures = {PurePosixPath(name).stem: data for name, data in members(path, r"/assets/[^/]+\.webp$")}
    for worn, stem in GLASSES.items():
        with Image.open(io.BytesIO(pictures[stem])) as image:
            glasses = image.convert("RGBA")
        glasses = glasses.crop(glasses.getbbox())
        for face in sorted(pictures):
            emoji = usable(face, names)
            if emoji is None or emoji.name not in FACES:
                continue
            with Image.open(io.BytesIO(pictures[face])) as image:
                yield Record(
                    "composed",
                    f"{emoji.name} with {worn}",
                    emoji.keywords,
                    on_white(_worn(image, glasses, FACES[emoji.name]), size),
                )


def _worn(face: Image.Image, glasses: Image.Image, eyes: float) -> Image.Image:
    """Glasses before the eyes, three quarters of the face wide."""
    face = face.convert("RGBA")
    left, top, right, bottom = face.getbbox() or (0, 0, *face.size)
    width = round(0.76 * (right - left))
    height = round(width * glasses.height / glasses.width)
    scaled = glasses.resize((width, height), Image.Resampling.LANCZOS)
    x, y = (left + right - width) // 2, round(top + eyes * (bottom - top) - height / 2)
    face.alpha_composite(scaled, (max(0, x), max(0, y)))
    return face


def read_noto(path: Path, size: int, names: Mapping[str, Emoji]) -> Iterable[Record]:
    """The flat vector pictures, in the order of the archive's own table."""
    icons = _json_member(path, r"/icons\.json$")["icons"]
    side = max(size, SVG_SIZE)
    for code, icon in _json_member(path, r"/chars\.json$").items():
        emoji = usable(code, names)
        if emoji is None or icon not in icons:
            continue
        body = icons[icon]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{body}</svg>'
        with Image.open(io.BytesIO(_draw(svg, side))) as image:
            yield Record("flat", emoji.name, emoji.keywords, on_white(image, size))


def read_clipart(path: Path, size: int, names: Mapping[str, Emoji]) -> Iterable[Record]:
    """Public-domain clip art of the everyday subjects, in the order of file names; unreadable drawings are skipped."""
    del names
    drawings = sorted(members(path, r"/openclipart/svg/[^/]+/.*\.svg$"))
    for name, data in drawings:
        parts = PurePosixPath(name).parts
        folders = parts[parts.index("svg") + 1 : -1]
        text = data.decode("utf-8", "replace")
        title = _clipart_title(text)
        if folders[0] not in _SUBJECTS or _OFF_SUBJECT & set(folders) or not title or "PublicDomain" not in text:
            continue
        words = tuple(w for w in _clipart_keywords(text) if w not in (title, folders[0]))
        try:
            with Image.open(io.BytesIO(_draw(text, 4 * max(size, SVG_SIZE)))) as image:
                pixels = on_white(_cropped(image), size)
        except (ValueError, OSError):
            continue
        if pixels.std() > 8:  # an empty page, or a drawing outside its own frame
            yield Record("clipart", title, words, pixels)


STYLES: dict[str, Style] = {
    "3d": Style(FLUENT, 1535, read_fluent, "3d emoji", optional_phrase=True),
    "composed": Style(FLUENT, 76, read_composed, "3d emoji", optional_phrase=True),
    "flat": Style(NOTO, 1576, read_noto, "flat emoji", captions=3),
    "clipart": Style(CLIPART, 1600, read_clipart, "clip art"),
}


def on_white(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Laid on white, padded to a square about its centre, scaled by Lanczos to uint8 [size, size, 3]."""
    image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, (255, 255, 255, 255))
    page.alpha_composite(image)
    flat = page.convert("RGB")
    side = max(flat.size)
    if flat.size != (side, side):
        square = Image.new("RGB", (side, side), (255, 255, 255))
        square.paste(flat, ((side - flat.size[0]) // 2, (side - flat.size[1]) // 2))
        flat = square
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS))


def _cropped(image: Image.Image, margin: float = 0.04) -> Image.Image:
    """The drawing without the empty page around it: many are small on a sheet of A4."""
    image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, (255, 255, 255, 255))
    page.alpha_composite(image)
    box = ImageChops.invert(page.convert("L")).point([0] * 8 + [255] * 248).getbbox()
    if box is None:
        return page
    pad = round(margin * max(box[2] - box[0], box[3] - box[1]))
    left, top, right, bottom = box
    return page.crop((left - pad, top - pad, right + pad, bottom + pad))  # outside the page: transparent


def _plain(text: str) -> str:
    return text.replace("\ufe0f", "")


def usable(stem: str, names: Mapping[str, Emoji]) -> Emoji | None:
    """The emoji of a file stem such as `1f98a` or `1f469-200d-1f680`; None for one to leave out."""
    try:
        character = _plain("".join(chr(int(code, 16)) for code in stem.split("-")))
    except (ValueError, OverflowError):
        return None
    if any(0x1F3FB <= ord(c) <= 0x1F3FF or 0x1F1E6 <= ord(c) <= 0x1F1FF for c in character):
        return None
    emoji = names.get(character)
    if emoji is None:
        return None
    tile = emoji.group == "Symbols" and any(word in emoji.name for word in ("button", "keycap", "input"))
    return None if tile else emoji


def _json_member(path: Path, pattern: str) -> dict[str, Any]:
    for _, data in members(path, pattern):
        return json.loads(data)
    raise ConfigError(f"{path} holds no file like {pattern!r}: delete it and run the command again")


def _draw(svg: str, side: int) -> bytes:
    """PNG bytes of a drawing, at most `side` pixels wide and high."""
    try:
        import resvg_py
    except ImportError:
        raise ConfigError(
            "Vector art needs the package resvg_py, which is not installed. "
            "Type: pip install efficient-diffusion-suite[image]"
        ) from None
    # Without dpi=96 (CSS pixels) sizes in mm and pt count as zero.
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, dpi=96))


def _clipart_title(svg: str) -> str:
    """A clean lower-case English title, or '' when there is none worth a caption."""
    found = re.search(r"<dc:title>([^<]*)</dc:title>", svg)
    title = html.unescape(found[1]) if found else ""
    title = re.sub(r"clip ?art by [^-]* - ", "", title, flags=re.IGNORECASE)
    title = re.sub(r"[\s_]+", " ", re.sub(r"[_ ]*\d+$", "", title)).strip(" .-").lower()
    good = title.isascii() and 3 <= len(title) <= 40 and re.fullmatch(r"[a-z][a-z ,'()-]*", title)
    return title if good and not _UNNAMED & set(title.split()) else ""


def _clipart_keywords(svg: str) -> Iterable[str]:
    for word in re.findall(r"<rdf:li>([^<]*)</rdf:li>", svg):
        clean = html.unescape(word).strip().lower()
        if re.fullmatch(r"[a-z][a-z -]{2,20}", clean) and "hash" not in clean and clean != "unsorted":
            yield clean
