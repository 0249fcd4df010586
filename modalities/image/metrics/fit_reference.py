"""Make the reference statistics of the Fluent 3D set.

python -m suite.modalities.image.metrics.fit_reference
"""

from __future__ import annotations

import argparse
from pathlib import Path

from suite.modalities.image.metrics.features import features
from suite.modalities.image.metrics.fit_alignment import TEST_STYLE, as_pictures, read_records
from suite.modalities.image.metrics.reference import FLUENT, fit_reference, save_reference
from suite.modalities.shared.fetch import cache_dir

ORIGINAL = 256
"""Pixels of the pictures in the archive."""


def main() -> None:
    """Fetch, extract, write."""
    parser = argparse.ArgumentParser(description="Make the reference statistics of the image metrics.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="folder of the archives")
    parser.add_argument("--out", type=Path, default=FLUENT, help="file to write")
    given = parser.parse_args()
    pictures = as_pictures(read_records(TEST_STYLE, given.cache, ORIGINAL))
    save_reference(fit_reference(features(pictures)), given.out)
    print(f"Wrote {given.out}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
