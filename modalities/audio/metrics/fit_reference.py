"""Make the reference statistics of the audio metrics, and measure what real clips that no training saw reach.

python -m suite.modalities.audio.metrics.fit_reference --data audio-waves.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from suite.modalities.audio.data import load_waves
from suite.modalities.audio.metrics import embedding, musicnn
from suite.modalities.audio.metrics.reference import FILE, save_reference
from suite.modalities.shared.fetch import cache_dir


def main() -> None:
    """Read, extract, write."""
    parser = argparse.ArgumentParser(description="Make the reference statistics of the audio metrics.")
    parser.add_argument("--data", type=Path, required=True, help="audio-waves.safetensors")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="folder of the archives")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write")
    given = parser.parse_args()
    waves = load_waves(given.data)
    sounds = waves.floats(slice(waves.held_out, None))
    save_reference(musicnn.features(sounds)[0], embedding.features(sounds, given.cache), given.out)
    print(f"Wrote {given.out}: {len(sounds)} clips")


if __name__ == "__main__":
    main()
