"""Quality of finished objects: do their views show what was asked for, do views agree, is the mesh closed.

Needs the extras `metrics` and `3d`; nothing is fetched. Alignment is by the image modality's head, which was fitted on
flat vector art: it has seen neither the priors' pictures nor rendered furniture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image.metrics.alignment import check_prompts, own_scores, recall
from suite.modalities.image.metrics.features import features
from suite.modalities.three_d.camera import ring
from suite.modalities.three_d.pictures import render

if TYPE_CHECKING:
    from trimesh import Trimesh

SIDES = ring(8, math.radians(20))
"""Views that are judged."""
SIZE = 96
"""Pixels of a view."""


def evaluate(meshes: Sequence[Trimesh | None], prompts: Sequence[str]) -> dict[str, float]:
    """All metrics of objects made from `prompts`; None is an object that stayed empty.

    Returns:
        empty: share of objects without a surface; the other numbers are over those that have one.
        alignment, r_at_1, r_at_5, consistency: see `of_views`.
        watertight: share of closed meshes; faces: mean number of them.
        n: number of objects.
    """
    check_prompts(len(meshes), prompts)
    whole = [(mesh, prompt) for mesh, prompt in zip(meshes, prompts, strict=True) if mesh is not None]
    found = {"empty": 1 - len(whole) / max(1, len(meshes)), "n": float(len(meshes))}
    if not whole:
        return found
    views = torch.stack([render(mesh, SIDES, SIZE) for mesh, _ in whole])
    found |= of_views(views, [prompt for _, prompt in whole], prompts)
    found["watertight"] = sum(mesh.is_watertight for mesh, _ in whole) / len(whole)
    found["faces"] = sum(len(mesh.faces) for mesh, _ in whole) / len(whole)
    return found


def of_views(views: Tensor, prompts: Sequence[str], candidates: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of views [N, V, 3, S, S] in [0, 1], V neighbours around each of N objects, a prompt an object.

    Returns:
        alignment: mean cosine of view and prompt; higher is better.
        r_at_1, r_at_5: R-precision (DreamFusion, section 4): share of views whose own prompt is among the 1 or 5 best
            of all different prompts given, `candidates` included; compare equal lists only.
        consistency: mean cosine of the features of neighbouring views, less that of views of different objects (which
            is 0 for one object); higher is better.
    """
    if views.ndim != 5 or not len(views):
        raise ConfigError(f"views has shape {list(views.shape)}, expected [objects, views, 3, size, size]")
    check_prompts(len(views), prompts)
    objects, sides = views.shape[:2]
    flat = features(views.flatten(0, 1))
    # A row of zeros an extra candidate: it adds a column to rank against, and its own row is dropped again.
    extra = [prompt for prompt in dict.fromkeys(candidates) if prompt not in prompts]
    asked = [prompt for prompt in prompts for _ in range(sides)]
    padded = torch.cat([flat, flat.new_zeros(len(extra), flat.shape[1])])
    scores, own = (found[: len(flat)] for found in own_scores(padded, [*asked, *extra]))
    unit = F.normalize(flat, dim=-1).view(objects, sides, -1)
    near = (unit * unit.roll(1, dims=1)).sum(-1).mean()
    middle = unit.mean(1)
    between = middle @ middle.T
    far = between[~torch.eye(objects, dtype=torch.bool)].mean() if objects > 1 else between.new_zeros(())
    return {
        "alignment": float(scores.gather(1, own[:, None]).mean()),
        "r_at_1": recall(scores, own, 1),
        "r_at_5": recall(scores, own, 5),
        "consistency": float(near - far),
    }
