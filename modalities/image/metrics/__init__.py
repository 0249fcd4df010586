"""Quality of pictures: distance from a reference set, and agreement with the prompts.

Needs the extras `metrics` and `image`; nothing is fetched. `weights/README.md` is the card of what ships.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image.metrics.alignment import alignment as alignment
from suite.modalities.image.metrics.alignment import check_prompts, own_scores, recall
from suite.modalities.image.metrics.alignment import retrieval as retrieval
from suite.modalities.image.metrics.features import check_pictures
from suite.modalities.image.metrics.features import features as features
from suite.modalities.image.metrics.reference import Reference as Reference
from suite.modalities.image.metrics.reference import fit_reference as fit_reference
from suite.modalities.image.metrics.reference import load_reference as load_reference

LEAST = 4
"""Pictures below which a distance between sets means nothing."""


def evaluate(pictures: Tensor, prompts: Sequence[str], reference_pictures: Tensor | None = None) -> dict[str, float]:
    """All image metrics of `pictures` [N, 3, H, W] (uint8, or float in [0, 1]) made from `prompts`, N >= 4.

    Reference: the Fluent 3D emoji that ship as statistics, or `reference_pictures` [M, 3, H', W'], M >= 4.
    Returns:
        frechet: in the reference's 256 main axes; lower is better; biased upwards for small N, compare equal N.
        kernel, kernel_stderr: unbiased; lower is better, about 0 for the reference's own distribution.
        alignment, alignment_stderr: mean cosine of picture and prompt; higher is better.
        r_at_1, r_at_5: share of pictures whose prompt is among the 1 or 5 best of all prompts given.
        n: number of pictures.
    """
    check_pictures(pictures)
    check_prompts(pictures.shape[0], prompts)
    _enough("pictures", pictures)
    if reference_pictures is None:
        reference = load_reference()
    else:
        check_pictures(reference_pictures)
        _enough("reference pictures", reference_pictures)
        reference = fit_reference(features(reference_pictures))
    found = features(pictures)
    kernel = reference.kernel(found)
    scores, own = own_scores(found, prompts)
    cosines = scores.gather(1, own[:, None])[:, 0].double()
    return {
        "frechet": reference.frechet(found),
        "kernel": kernel.value,
        "kernel_stderr": kernel.stderr,
        "alignment": float(cosines.mean()),
        "alignment_stderr": float(cosines.std() / len(cosines) ** 0.5),
        "r_at_1": recall(scores, own, 1),
        "r_at_5": recall(scores, own, 5),
        "n": float(len(cosines)),
    }


def _enough(what: str, pictures: Tensor) -> None:
    if pictures.shape[0] < LEAST:
        raise ConfigError(f"Got {pictures.shape[0]} {what}, expected {LEAST} or more: distances compare sets")
