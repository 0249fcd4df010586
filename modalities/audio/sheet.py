"""Spectrograms of sound files as one picture.

python -m suite.modalities.audio.sheet FOLDER -o sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.audio.files import SUFFIXES, Sound, as_tensor, read
from suite.modalities.audio.mel import log_mel


def save_spectrograms(pictures: Tensor, path: Path, columns: int = 4) -> None:
    """Write pictures [N, 80, 128] in [-1, 1] as one PNG, low bands at the bottom, two pixels apart."""
    levels = ((pictures.cpu().flip(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    count, bands, frames = levels.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (bands + 2), columns * (frames + 2)), 255, dtype=torch.uint8)
    for k, level in enumerate(levels):
        top, left = k // columns * (bands + 2), k % columns * (frames + 2)
        canvas[top : top + bands, left : left + frames] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda made: Image.fromarray(canvas.numpy()).save(made, format="PNG"))


def sheet(sounds: Sequence[Sound], path: Path, columns: int = 5) -> None:
    """Write the spectrograms of sounds of 16 kHz, in order, row by row."""
    save_spectrograms(log_mel(as_tensor(sounds)), path, columns)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description="Draw the spectrograms of sound files.")
    parser.add_argument("folder", type=Path, help="folder of sound files, drawn in the order of their names")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=5, help="spectrograms in a row")
    given = parser.parse_args()
    files = sorted(f for f in given.folder.glob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"{given.folder} has no files ending in {', '.join(SUFFIXES)}")
    sheet([read(f) for f in files], given.output, given.columns)
    print(f"Wrote {given.output}: {len(files)} sounds")


if __name__ == "__main__":
    main()
