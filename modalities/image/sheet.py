"""Contact sheets: many small pictures on one white page, for a person to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Pictures


def sheet(pictures: Sequence[Pictures.Image], columns: int = 10, cell: int = 96, gap: int = 4) -> Pictures.Image:
    """The pictures in reading order, each scaled to `cell` pixels."""
    lines = -(-len(pictures) // columns)
    page = Pictures.new("RGB", (columns * (cell + gap) + gap, lines * (cell + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        at = (gap + (i % columns) * (cell + gap), gap + (i // columns) * (cell + gap))
        page.paste(picture.convert("RGB").resize((cell, cell), Pictures.Resampling.LANCZOS), at)
    return page


def main() -> None:
    """`python -m suite.modalities.image.sheet FOLDER -o sheet.png`: a sheet of a folder's PNG files, by name."""
    parser = argparse.ArgumentParser(description="Make a contact sheet of a folder's PNG files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--cell", type=int, default=96)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.png"))
    if not files:
        parser.error(f"{arguments.folder} holds no PNG files")
    sheet([Pictures.open(f) for f in files], arguments.columns, arguments.cell).save(arguments.output)


if __name__ == "__main__":
    main()
