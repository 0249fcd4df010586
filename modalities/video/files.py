"""Clips <-> files: .mp4 (H.264), .webp (transparent), .gif, and .frames, a folder of PNG.

Each holds the result's metadata as JSON: the comment tag of an MP4 or GIF, the EXIF description of a WebP,
`metadata.json` in a folder. An MP4 and a GIF show the clip on white; the others keep its opacity.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from suite.errors import ConfigError
from suite.files.output import RECORD
from suite.files.untrusted import parse_json

SUFFIXES = (".mp4", ".webp", ".gif", ".frames")
DIGEST = "frames_sha256"
"""Key of the digest of the frames that an MP4 was encoded from: x264 may encode equal frames differently."""
TOLERANCE = 2.0
"""Mean difference, in levels, that two encodings of equal frames may have."""
CRF = 12
"""x264's constant rate factor: visually lossless; a clip takes some 30 KB."""
_DESCRIPTION = 0x010E
_INSTALL = "pip install efficient-diffusion-suite[video]"


@dataclass(frozen=True, eq=False)
class Clip:
    """A finished clip: `colour` uint8 [F, H, W, 3] laid on white, `opacity` uint8 [F, H, W], `rate` frames a second.

    `loops` is how often a file without endless repetition (MP4) shows it.
    """

    colour: NDArray[np.uint8] = field(repr=False)
    opacity: NDArray[np.uint8] = field(repr=False)
    rate: float
    loops: int = 1

    @property
    def seconds(self) -> float:
        """Length of one loop."""
        return len(self.colour) / self.rate

    def straight(self) -> NDArray[np.uint8]:
        """RGBA [F, H, W, 4] without the white: colour = (on white - (1 - opacity)) / opacity."""
        part = self.opacity[..., None].astype(np.float32) / 255
        colour = (self.colour - 255 * (1 - part)) / np.maximum(part, 1e-3)
        colour = np.where(part > 0, colour.round().clip(0, 255), 255).astype(np.uint8)
        return np.concatenate([colour, self.opacity[..., None]], -1)


def check_suffix(suffix: str) -> None:
    """Raise ConfigError when files of this ending cannot be written here."""
    if suffix == ".mp4":
        _h264()
    elif suffix == ".webp":
        from PIL import features

        if not features.check("webp"):
            raise ConfigError("This Pillow has no WebP encoder: type pip install --force-reinstall pillow, or use .gif")


def save(clip: Clip, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write to exactly `path`; its ending chooses the format."""
    text = json.dumps(metadata)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _save_mp4(clip, path, json.dumps({**metadata, DIGEST: hashlib.sha256(clip.colour.tobytes()).hexdigest()}))
    elif suffix == ".webp":
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        pictures = [Image.fromarray(frame) for frame in clip.straight()]
        _animate(pictures, clip, path, format="WEBP", lossless=True, exif=exif, minimize_size=False)
    elif suffix == ".gif":
        pictures = [Image.fromarray(frame) for frame in clip.colour]
        _animate(pictures, clip, path, format="GIF", comment=text.encode())
    else:
        path.mkdir()
        for index, frame in enumerate(clip.straight()):
            Image.fromarray(frame).save(path / f"{index:03d}.png")
        (path / RECORD).write_text(json.dumps({**metadata, "rate": clip.rate}, indent=2) + "\n")


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata that `save` wrote. Raises ConfigError when the file is not readable or has none."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".mp4":
            with pyav().open(str(path)) as box:
                text = box.metadata.get("comment")
        elif suffix == ".frames":
            record = path / RECORD
            text = record.read_text() if record.is_file() else None
        else:
            with Image.open(path) as picture:
                found = picture.getexif().get(_DESCRIPTION) if suffix == ".webp" else picture.info.get("comment")
            text = found.decode() if isinstance(found, bytes) else found
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable clip: {error}") from error
    if not text:
        raise ConfigError(f"{path} was not made by this suite: it holds no metadata of it")
    found = parse_json(text, f"{path}: its metadata")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: its metadata is no object")
    for own in ("rate",) * (suffix == ".frames") + (DIGEST,) * (suffix == ".mp4"):
        found.pop(own, None)
    return found


def digest(path: Path) -> str:
    """sha256 of the frames that an MP4 file was encoded from; empty if it says none."""
    with pyav().open(str(path)) as box:
        return str(json.loads(box.metadata.get("comment") or "{}").get(DIGEST, ""))


def same(first: Path, second: Path) -> bool:
    """Whether two clips hold equal frames: decoded, because encoders differ between versions and stamp their files.

    x264 has been seen to encode equal frames differently. So two MP4 files are compared by the digests of what they
    were encoded from, and their pictures only so far that a file with other pictures and an old digest is told.
    """
    a, b = read_frames(first), read_frames(second)
    if a.shape != b.shape:
        return False
    digests = [digest(path) if path.suffix.lower() == ".mp4" else "" for path in (first, second)]
    if all(digests):
        return digests[0] == digests[1] and float(np.abs(a.astype(int) - b).mean()) < TOLERANCE
    return bool((a == b).all())


def read_frames(path: Path) -> NDArray[np.uint8]:
    """All frames of a file, uint8 [F, H, W, 3 or 4]."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".mp4":
            with pyav().open(str(path)) as box:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)])
        if suffix == ".frames":
            pictures = [Image.open(file) for file in sorted(path.glob("*.png"))]
            return np.stack([np.asarray(picture.convert("RGBA")) for picture in pictures])
        with Image.open(path) as picture:
            return np.stack([np.asarray(frame.convert("RGBA")) for frame in ImageSequence.Iterator(picture)])
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable clip: {error}") from error


def on_white(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB or straight RGBA frames -> RGBA with the colour laid on white; RGB is opaque."""
    if frames.shape[-1] == 3:
        return np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)
    part = frames[..., 3:].astype(np.float32) / 255
    colour = (frames[..., :3] * part + 255 * (1 - part)).round().astype(np.uint8)
    return np.concatenate([colour, frames[..., 3:]], -1)


def fitted(chosen: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of each of the RGBA frames in (width, height)."""
    if chosen.shape[1:3] == (size[1], size[0]):
        return chosen.copy()

    def fit(channels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(ImageOps.fit(Image.fromarray(channels), size, Image.Resampling.LANCZOS))

    # Apart, because colour on white is not to be weighted by opacity a second time.
    return np.stack([np.dstack([fit(f[..., :3].copy()), fit(f[..., 3].copy())]) for f in chosen])


def _animate(pictures: list[Image.Image], clip: Clip, path: Path, **options: Any) -> None:
    # GIF counts hundredths of a second: rounding every moment, not every frame, keeps the length right.
    moments = [round(100 * k / clip.rate) for k in range(len(pictures) + 1)]
    durations = [10 * (b - a) for a, b in itertools.pairwise(moments)]
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def _save_mp4(clip: Clip, path: Path, text: str) -> None:
    av = pyav()
    height, width = clip.colour.shape[1:3]
    with av.open(str(path), "w", format="mp4") as box:
        box.metadata["comment"] = text
        stream = box.add_stream(_h264(), rate=Fraction(clip.rate).limit_denominator(1000))
        # H.264's usual pixel format halves the colour, so sides must be even.
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        # One thread, the one that looks ahead included: equal frames must give equal files.
        alone = "threads=1:lookahead-threads=1:sync-lookahead=0:deterministic=1"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(CRF), "preset": "medium", "x264-params": alone}
        for frame in np.concatenate([clip.colour] * clip.loops):
            padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
            box.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        box.mux(stream.encode())


def pyav() -> Any:
    """PyAV. Raises ConfigError when it is not installed."""
    try:
        import av
    except ImportError:
        raise ConfigError(
            f"MP4 files need PyAV, which is not installed. Type: {_INSTALL}, or use .webp or .gif"
        ) from None
    return av


def _h264() -> str:
    """The H.264 encoder. Raises ConfigError when there is none."""
    if "libx264" not in pyav().codecs_available:
        raise ConfigError("This PyAV has no H.264 encoder (libx264): use .webp or .gif, or install PyAV's own wheel")
    return "libx264"
