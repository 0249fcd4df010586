"""Picture files as a viewer shows them: turned as the camera was held, in sRGB, with opacity. No torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from suite.errors import ConfigError

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes for more than 8 bits of grey, which it clips and does not scale."""


@contextmanager
def opened(path: Path, what: str = "picture") -> Iterator[Image.Image]:
    """An open picture file, read as far as its head.

    Raises:
        ConfigError: it is no picture, damaged (also when that is found while it is used), or too large to be unpacked
            (`PIL.Image.MAX_IMAGE_PIXELS`, against files that are made to fill the memory).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(
            f"{path} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that a {what} may have; make it smaller"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is not a readable {what}: {error}") from error


def as_seen(picture: Image.Image) -> Image.Image:
    """The present frame as RGBA, 8 bits a channel, not premultiplied.

    Turned and mirrored as EXIF says; 16 bits scaled to 8; palettes, colour keys and premultiplied opacity resolved;
    colours converted to sRGB by the ICC profile if the file has one that can be read, and else taken for sRGB. Gamma
    and chromaticities that a PNG gives without a profile are ignored.
    """
    profile = picture.info.get("icc_profile")
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in DEEP:
        return _deep(turned)
    if turned.mode in ("CMYK", "LAB"):
        return (_converted(turned, profile) or turned.convert("RGB")).convert("RGBA")
    layers = turned.convert("LA").convert("RGBA") if turned.mode == "La" else turned.convert("RGBA")
    converted = _converted(layers.convert("L" if turned.mode in ("1", "L", "LA", "La") else "RGB"), profile)
    if converted is not None:
        converted.putalpha(layers.getchannel("A"))
        return converted
    return layers


def on_white(layers: Image.Image) -> Image.Image:
    """RGBA -> RGB; what shows through is white."""
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def _deep(picture: Image.Image) -> Image.Image:
    """16 bits of grey (or floats in [0, 1]); a colour key is a level of the 16 bits."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ConfigError("a picture has values that are no numbers")
    levels = values * 255 if picture.mode == "F" else values / 257
    grey = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    layers = grey.convert("RGBA")
    key = picture.info.get("transparency")
    if isinstance(key, int):
        layers.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return layers


def _converted(picture: Image.Image, profile: bytes | None) -> Image.Image | None:
    """In sRGB by its profile; None without one, or with one of another kind of colours or that is damaged."""
    if not profile:
        return None
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # as viewers do
