"""How well a picture fits its prompt: two small networks over frozen features, in the manner of CLIP.

Picture: EfficientNet-Lite0 features, standardised -> MLP 1280-512-256. Prompt: MiniLM sentence embedding -> MLP
384-512-256. The score is the cosine of the two (contrastive training: Radford et al. 2021, arXiv 2103.00020).
The shipped head was fitted on flat vector art only (`fit_alignment`), so it has no memory of the 3D pictures that
the shipped generators learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.image.metrics.features import WIDTH, features
from suite.modalities.shared import text_encoder
from suite.observe.finite import load_finite

HIDDEN = 512
SHARED = 256
"""Channels of the space where pictures and prompts meet."""

WEIGHTS = Path(__file__).parent / "weights" / "alignment.safetensors"


class Head(nn.Module):
    """Both projections, and the standardisation of picture features. 1.1 M parameters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(WIDTH))
        self.std = nn.Buffer(torch.ones(WIDTH))
        self.picture = _mlp(WIDTH, dropout)
        self.text = _mlp(text_encoder.WIDTH, dropout)

    def pictures(self, found: Tensor) -> Tensor:
        """Picture features [N, 1280] -> unit vectors [N, 256]."""
        return F.normalize(self.picture((found - self.mean) / self.std), dim=-1)

    def prompts(self, embeddings: Tensor) -> Tensor:
        """Sentence embeddings [N, 384] -> unit vectors [N, 256]."""
        return F.normalize(self.text(embeddings), dim=-1)


def alignment(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine [N] in [-1, 1] of each of `pictures` [N, 3, H, W] with its own prompt. Formats as in `features`."""
    check_prompts(pictures.shape[0], prompts)
    scores, own = own_scores(features(pictures), prompts)
    return scores[torch.arange(len(own)), own]


def retrieval(pictures: Tensor, prompts: Sequence[str], k: int = 1) -> float:
    """R@k: the share of `pictures` [N, 3, H, W] whose own prompt is among the k best of all different prompts.

    Depends on how many different prompts P there are (chance is k / P): compare equal prompt lists only.
    """
    check_prompts(pictures.shape[0], prompts)
    return recall(*own_scores(features(pictures), prompts), k)


def own_scores(found: Tensor, prompts: Sequence[str], head: Head | None = None) -> tuple[Tensor, Tensor]:
    """Cosines [N, P] of picture features [N, 1280] with the P different prompts, and each picture's column [N]."""
    head = load_head() if head is None else head
    unique = list(dict.fromkeys(prompts))
    column = {prompt: i for i, prompt in enumerate(unique)}
    with torch.inference_mode():
        scores = head.pictures(found.cpu().float()) @ head.prompts(sentence_embeddings(unique)).T
    return scores.clone(), torch.tensor([column[prompt] for prompt in prompts], dtype=torch.long)


def recall(scores: Tensor, own: Tensor, k: int) -> float:
    """Share of rows of `scores` [N, P] where fewer than k columns beat, or tie with, the column `own` [N]."""
    if k < 1:
        raise ConfigError(f"k is {k}, expected 1 or more")
    mine = scores.gather(1, own[:, None])
    # A tie counts against the row: a head that gives every prompt the same score must not come out perfect.
    better = (scores >= mine).sum(1) - 1
    return float((better < k).double().mean())


def sentence_embeddings(texts: Sequence[str]) -> Tensor:
    """MiniLM sentence embeddings [N, 384]: token states averaged, unit length (Reimers & Gurevych 2019)."""
    tokens = text_encoder.encode(texts, length=32)
    return F.normalize(tokens.states.sum(1) / tokens.mask.sum(1, keepdim=True).clamp(min=1), dim=-1)


def save_head(head: Head, path: Path) -> None:
    """Write the head in float16: 2.2 MB."""
    tensors = {name: value.half().contiguous() for name, value in head.state_dict().items()}
    write(path, lambda made: save_file(tensors, made))


@lru_cache(maxsize=4)
def load_head(path: Path = WEIGHTS) -> Head:
    """Read a head, in float32 and eval mode. Raises ConfigError when the file is absent or does not fit."""
    head = Head()
    try:
        head.load_state_dict({name: value.float() for name, value in load_finite(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"The alignment head {path} cannot be read ({error}): reinstall, or fit it again with "
            "python -m suite.modalities.image.metrics.fit_alignment"
        ) from error
    return head.eval().requires_grad_(False)


def check_prompts(count: int, prompts: Sequence[str]) -> None:
    """Raise ConfigError unless there is one prompt for each of `count` pictures."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the string {prompts!r}, expected a list with one prompt a picture")
    if len(prompts) != count:
        raise ConfigError(f"Got {count} pictures and {len(prompts)} prompts, expected one prompt a picture")


def _mlp(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(dropout), nn.Linear(HIDDEN, SHARED))
