"""Make the reference statistics of the animated Fluent emoji, and measure what to expect of the metrics.

python -m suite.modalities.video.metrics.fit_reference video-64.safetensors [--report]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from suite.modalities.shared.progress import tracked
from suite.modalities.video.data import load
from suite.modalities.video.metrics import evaluate
from suite.modalities.video.metrics.reference import FLUENT, fit_reference, save_reference


def main() -> None:
    """Read, extract, write; with --report also compare halves of the real clips."""
    parser = argparse.ArgumentParser(description="Make the reference statistics of the video metrics.")
    parser.add_argument("data", type=Path, help="file of `suite data prepare video`")
    parser.add_argument("--out", type=Path, default=FLUENT, help="file to write")
    parser.add_argument("--report", action="store_true", help="also print real against held-out real, stills and noise")
    given = parser.parse_args()
    data = load(given.data)
    clips = [clip.numpy() for clip in data.clips[:, :, :3].permute(0, 1, 3, 4, 2)]
    save_reference(fit_reference(clips), given.out)
    print(f"Wrote {given.out}: {len(clips)} clips")
    if not given.report:
        return
    order = np.random.default_rng(0).permutation(len(clips))
    real, held = order[: len(order) // 2], order[len(order) // 2 :][:128]
    rng = np.random.default_rng(0)
    cases = {
        "held-out real clips": [clips[k] for k in held],
        "their first frame, still": [np.repeat(clips[k][:1], len(clips[k]), 0) for k in held],
        "their frames in random order": [clips[k][rng.permutation(len(clips[k]))] for k in held],
        "every second frame": [clips[k][::2] for k in held],
    }
    for name, case in tracked(cases.items(), "Comparing", len(cases)):
        numbers = evaluate(case, [data.names[k] for k in held], [clips[k] for k in real])
        print(name, " ".join(f"{key}={value:.4g}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
