"""Captioned clips out of public archives: the animated Fluent emoji.

Skin-tone variants are left out, as for pictures: they are near-duplicates. So are pictures that do not move.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from suite.modalities.image.sources import Emoji, usable
from suite.modalities.shared.fetch import Archive, members

FLUENT = tuple(
    Archive("npm", f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", "MIT", digest)
    for part, digest in (
        (1, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
        (2, "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
        (3, "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
        (4, "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
    )
)
EXPECTED = 700
"""Clips that the archives must give at least."""


@dataclass(frozen=True)
class Clip:
    """One loop: `frames` uint8 [F, S, S, 4] RGBA, straight alpha; `seconds` of the whole loop as the source has it."""

    name: str
    keywords: tuple[str, ...]
    seconds: float
    frames: NDArray[np.uint8] = field(repr=False)


def read_clips(archives: Sequence[Path], size: int, frames: int, names: Mapping[str, Emoji]) -> Iterator[Clip]:
    """The moving pictures, in the order of archives and of their files; `frames` evenly spread over each loop."""
    for archive in archives:
        for path, data in members(archive, r"/assets/[^/]+\.webp$"):
            emoji = usable(PurePosixPath(path).stem, names)
            if emoji is None:
                continue
            with Image.open(io.BytesIO(data)) as image:
                if getattr(image, "n_frames", 1) >= frames:
                    yield Clip(emoji.name, emoji.keywords, *_read(image, size, frames))


def _read(image: Image.Image, size: int, frames: int) -> tuple[float, NDArray[np.uint8]]:
    """Seconds of the loop, and its frames at these points of it, scaled by Lanczos."""
    count = image.n_frames  # pyright: ignore[reportAttributeAccessIssue]
    wanted = {round(k * count / frames): k for k in range(frames)}
    out = np.zeros((frames, size, size, 4), np.uint8)
    milliseconds = 0
    for index, frame in enumerate(ImageSequence.Iterator(image)):
        frame.load()  # which tells the duration
        milliseconds += int(frame.info["duration"])
        if index in wanted:
            out[wanted[index]] = np.asarray(frame.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))
    return milliseconds / 1000, out
