"""Clips to begin with, as a player shows them: turned, in the shape of its pixels, each frame for as long as it stands.

Frames are made smaller while they are read, so that memory is bounded by their number, and that is bounded too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from suite.errors import ConfigError
from suite.modalities.shared.pictures import as_seen, opened
from suite.modalities.video.files import on_white, pyav

SIDE = 256
"""Pixels of the shorter side that are kept, nearly: models take 64, and a box filter loses nothing that they see."""
MOST = 2**28
"""Pixels of all frames that are kept: 1 GiB."""
SLACK = 0.01
"""Seconds that a frame may begin late: GIF counts hundredths, of its moments and of the whole."""


@dataclass(frozen=True, eq=False)
class Shown:
    """`frames` uint8 [F, H, W, 4], colour laid on white and opacity; `begins` [F] and `length` in seconds."""

    frames: NDArray[np.uint8] = field(repr=False)
    begins: NDArray[np.float64] = field(repr=False)
    length: float

    def evenly(self, count: int) -> NDArray[np.uint8]:
        """What is shown at `count` moments, evenly from the first on, [count, H, W, 4]."""
        moments = np.arange(count) * self.length / count
        return self.frames[np.searchsorted(self.begins, moments + SLACK, "right").clip(1) - 1]


def shown(path: Path) -> Shown:
    """Read a clip.

    Raises:
        ConfigError: it cannot be read, has no frame, or is too long or too large.
    """
    read = {".mp4": _mp4, ".frames": _folder}.get(path.suffix.lower(), _animated)
    frames: list[NDArray[np.uint8]] = []
    durations, total = [], 0
    for frame, seconds in read(path):
        small = np.asarray(frame.reduce(max(1, min(frame.size) // SIDE)))
        total += small.shape[0] * small.shape[1]
        if total > MOST:
            raise ConfigError(f"{path} is too long: {len(frames)} frames fill the memory that it may have; cut it")
        if frames and small.shape != frames[0].shape:
            raise ConfigError(f"{path} is not a readable clip: its frames are of different sizes")
        frames.append(small)
        durations.append(seconds)
    if not frames:
        raise ConfigError(f"{path} is not a readable clip: it has no frame")
    begins = np.cumsum([0.0, *durations])
    return Shown(on_white(np.stack(frames)), begins[:-1], float(begins[-1]))


def _animated(path: Path) -> Iterator[tuple[Image.Image, float]]:
    with opened(path, "clip") as picture:
        for frame in ImageSequence.Iterator(picture):
            # Where a file gives no time, browsers take a tenth of a second.
            yield as_seen(frame), float(frame.info.get("duration") or 100) / 1000


def _folder(path: Path) -> Iterator[tuple[Image.Image, float]]:
    for file in sorted(path.glob("*.png")):
        with opened(file) as picture:
            yield as_seen(picture), 1.0


def _mp4(path: Path) -> Iterator[tuple[Image.Image, float]]:
    av: Any = pyav()
    try:
        with av.open(str(path)) as box:
            if not box.streams.video:
                raise ConfigError(f"{path} is not a readable clip: it has no pictures")
            stream = box.streams.video[0]
            rate = float(stream.average_rate or 25)
            wide = float(stream.sample_aspect_ratio or 1) or 1.0
            waiting: tuple[Image.Image, float] | None = None
            last = 1 / rate
            for index, frame in enumerate(box.decode(stream)):
                begin = index / rate if frame.time is None else float(frame.time)
                if waiting is not None:
                    yield waiting[0], max(0.0, begin - waiting[1])
                waiting = _upright(frame, wide), begin
                last = float((getattr(frame, "duration", 0) or 0) * (frame.time_base or 0)) or 1 / rate
            if waiting is not None:
                yield waiting[0], last
    except (OSError, ValueError) as error:  # PyAV's errors are both
        raise ConfigError(f"{path} is not a readable clip: {error}") from error


def _upright(frame: Any, wide: float) -> Image.Image:
    """One frame as RGBA: stretched where pixels are not square, then turned as the file's display matrix says."""
    if frame.width * frame.height > (Image.MAX_IMAGE_PIXELS or frame.width * frame.height):
        raise ConfigError(f"a frame of {frame.width} x {frame.height} pixels is too large; make the clip smaller")
    picture = Image.fromarray(frame.to_ndarray(format="rgba"))
    if abs(wide - 1) > 0.01:
        picture = picture.resize((max(1, round(picture.width * wide)), picture.height), Image.Resampling.BILINEAR)
    turned = round(float(getattr(frame, "rotation", 0) or 0) / 90) * 90 % 360  # counter-clockwise, as Pillow turns
    return picture.rotate(turned, expand=True) if turned else picture
