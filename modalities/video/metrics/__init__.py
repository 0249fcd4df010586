"""Quality of clips: distances of frames and of changes from real clips, motion, steadiness, agreement with prompts.

Needs the extras `metrics` and `video`; nothing is fetched. `weights/README.md` is the card of what ships.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from suite.errors import ConfigError
from suite.modalities.image.metrics.alignment import check_prompts, own_scores, recall
from suite.modalities.video.metrics.motion import features, flicker, motion, steadiness
from suite.modalities.video.metrics.reference import Reference, fit_reference, load_reference

LEAST = 4
"""Clips below which a distance between sets means nothing."""


def evaluate(
    clips: Sequence[NDArray[np.uint8]], prompts: Sequence[str], real: Sequence[NDArray[np.uint8]] | None = None
) -> dict[str, float]:
    """All video metrics of `clips`, uint8 [F, H, W, 3] each (F of 3 or more), made from `prompts`, N >= 4.

    Reference: the animated Fluent emoji that ship as statistics, or the clips `real`, 4 or more.
    Returns:
        frames_frechet, frames_kernel: of single frames; lower is better.
        changes_frechet, changes_kernel: of differences of successive frames (FVD-like); lower is better.
        (kernel distances are unbiased, with `_stderr`; Fréchet distances are biased upwards for small N.)
        motion: mean absolute change of a pixel from frame to frame, in 8-bit levels, averaged over clips.
        motion_ratio: median of the clips' motion over that of the reference; 1 is right, 0 a still.
        flicker: how unsteady the change is, 0 for even change, sqrt(3) for noise; averaged over clips.
        steadiness: cosine of successive frames' features; 1 for a still.
        alignment, r_at_1, r_at_5: agreement of a clip's mean frame feature with its prompt, as for pictures.
        n: number of clips.
    """
    check_prompts(len(clips), prompts)
    if len(clips) < LEAST or (real is not None and len(real) < LEAST):
        raise ConfigError(f"Got {len(clips)} clips, expected {LEAST} or more: distances compare sets")
    reference: Reference = load_reference() if real is None else fit_reference(real)
    found = features(clips)
    frames, changes = reference.frames.kernel(found.pooled), reference.changes.kernel(found.changes)
    scores, own = own_scores(found.frames.mean(1), prompts)
    amounts = [motion(clip) for clip in clips]
    return {
        "frames_frechet": reference.frames.frechet(found.pooled),
        "frames_kernel": frames.value,
        "frames_kernel_stderr": frames.stderr,
        "changes_frechet": reference.changes.frechet(found.changes),
        "changes_kernel": changes.value,
        "changes_kernel_stderr": changes.stderr,
        "motion": float(np.mean(amounts)),
        "motion_ratio": float(np.median(amounts) / np.median(reference.motion)),
        "flicker": float(np.mean([flicker(clip) for clip in clips])),
        "steadiness": steadiness(found.frames),
        "alignment": float(scores.gather(1, own[:, None]).double().mean()),
        "r_at_1": recall(scores, own, 1),
        "r_at_5": recall(scores, own, 5),
        "n": float(len(clips)),
    }
