"""Moving contact sheets: many small clips on one white page, as an animated WebP, for a person to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from suite.modalities.video.files import read_frames


def sheet(clips: Sequence[NDArray[np.uint8]], columns: int = 10, gap: int = 4) -> NDArray[np.uint8]:
    """Clips [F, H, W, 3] of equal size in reading order -> one clip [F, H', W', 3]."""
    frames, height, width, _ = clips[0].shape
    lines = -(-len(clips) // columns)
    page = np.full((frames, lines * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, clip in enumerate(clips):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = clip
    return page


def on_white(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA or RGB [..., 3 or 4] -> RGB on white."""
    part = frames[..., 3:] / 255.0 if frames.shape[-1] == 4 else 1.0
    return (frames[..., :3] * part + 255 * (1 - part)).round().astype(np.uint8)


def save_sheet(clips: Sequence[NDArray[np.uint8]], path: Path, columns: int = 10, rate: float = 8.0) -> None:
    """Write a sheet of clips as an animated WebP of good quality, which is far smaller than a lossless one."""
    first, *rest = (Image.fromarray(frame) for frame in sheet(clips, columns))
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0, quality=80)


def main() -> None:
    """`python -m suite.modalities.video.sheet FOLDER -o sheet.webp`: a sheet of a folder's .webp clips, by name."""
    parser = argparse.ArgumentParser(description="Make a moving contact sheet of a folder's .webp clips.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.webp"))
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--rate", type=float, default=8.0)
    given = parser.parse_args()
    files = sorted(given.folder.glob("*.webp"))
    if not files:
        parser.error(f"{given.folder} holds no .webp clips")
    save_sheet([on_white(read_frames(file)) for file in files], given.output, given.columns, given.rate)


if __name__ == "__main__":
    main()
