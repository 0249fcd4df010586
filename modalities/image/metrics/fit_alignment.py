"""Fit the alignment head on flat vector art (Noto and Open Clip Art), and test it on 3D pictures it never saw.

python -m suite.modalities.image.metrics.fit_alignment

Contrastive: symmetric InfoNCE (Oord et al. 2018, arXiv 1807.03748), where captions that say nearly the same share the
target. Frozen features make it a matter of seconds; nearly all the time goes into extracting them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image.metrics.alignment import (
    WEIGHTS,
    Head,
    own_scores,
    recall,
    save_head,
    sentence_embeddings,
)
from suite.modalities.image.metrics.features import features
from suite.modalities.image.sources import KEYWORDS, NAMES, STYLES, Record, emoji_names
from suite.modalities.shared.fetch import cache_dir, fetch
from suite.modalities.shared.text_encoder import WIDTH

TRAINING_STYLES = ("flat", "clipart")
TEST_STYLE = "3d"
HELD_OUT = 302
"""Pictures of the test, drawn once with seed 0 from the 3D set."""

_PIXELS = 160
_SMALL = 64


@dataclass(frozen=True)
class Recipe:
    """How the head is fitted. `same` is the cosine of two captions' embeddings above which they share a target."""

    epochs: int = 60
    batch: int = 512
    rate: float = 1e-3
    decay: float = 0.05
    dropout: float = 0.3
    temperature: float = 0.07
    same: float = 0.97


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures as features, and their captions.

    `views` [V, N, 1280] float32, the same picture sharp, from 64 px, and mirrored; `names` one a picture;
    `captions` [N, K, 384], sentence embeddings of K ways to say it.
    """

    names: tuple[str, ...]
    views: Tensor
    captions: Tensor


def read_records(style: str, cache: Path, size: int = _PIXELS) -> list[Record]:
    """All pictures of one style of `sources.STYLES`, from archives in `cache`, fetched if they are not there."""
    source = STYLES[style]
    names = emoji_names(fetch(NAMES, cache), fetch(KEYWORDS, cache))
    return list(source.read(fetch(source.archive, cache), size, names))


def as_pictures(records: Iterable[Record]) -> Tensor:
    """uint8 [N, 3, S, S]."""
    return torch.from_numpy(np.stack([record.pixels for record in records])).permute(0, 3, 1, 2)


def make_pairs(records: Sequence[Record], seed: int = 0) -> Pairs:
    """Features of each picture's views, and embeddings of its captions; the slow part, 40 pictures a second."""
    pictures = as_pictures(records)
    # Generated pictures are often small: the head must know what enlarging does to features.
    small = F.interpolate(pictures.float(), (_SMALL, _SMALL), mode="bicubic", antialias=True).clamp(0, 255)
    views = torch.stack([features(pictures), features(small.byte()), features(pictures.flip(-1))])
    rng = random.Random(seed)
    texts = [caption for record in records for caption in captions(record, rng)]
    embeddings = sentence_embeddings(texts).reshape(len(records), -1, WIDTH)
    return Pairs(tuple(plain_name(record) for record in records), views, embeddings)


def captions(record: Record, rng: random.Random) -> list[str]:
    """Five ways to say it: the name alone, with an article, with a style word, and twice with up to 3 keywords."""
    name = plain_name(record)
    article = "an" if name[0] in "aeiou" else "a"
    words = [word.replace("_", " ") for word in record.keywords if len(word) > 2 and word.isascii()]
    rng.shuffle(words)
    few, more = words[:2], words[2:5] or words[:3]
    return [name, f"{article} {name}", f"{name}, emoji", ", ".join([name, *few]), ", ".join([name, *more])]


def plain_name(record: Record) -> str:
    """The name in lower case with plain quotes."""
    return record.name.replace("’", "'").lower()


def fit_head(views: Tensor, texts: Tensor, seed: int = 0, recipe: Recipe | None = None) -> Head:
    """Fit a head to `views` [V, N, 1280] and `texts` [N, K, 384]; the same seed gives the same head.

    Every epoch takes each picture once, with a random view and a random caption. Raises ConfigError when the two
    do not belong together.
    """
    recipe = recipe or Recipe()
    if views.ndim != 3 or texts.ndim != 3 or views.shape[1] != texts.shape[0] or views.shape[1] < 2:
        raise ConfigError(
            f"views have shape {tuple(views.shape)} and texts {tuple(texts.shape)}, "
            "expected [V, N, 1280] and [N, K, 384]"
        )
    count, batch = views.shape[1], min(recipe.batch, views.shape[1])
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(recipe.dropout)
        head.mean.copy_(views.mean((0, 1)))
        head.std.copy_(views.std((0, 1)).clamp(min=1e-3))
        scale = torch.nn.Parameter(torch.tensor(1 / recipe.temperature).log())
        parameters = [*head.parameters(), scale]
        optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=recipe.decay)
        steps = recipe.epochs * (count // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=steps + 1)
        head.train()
        for _ in range(recipe.epochs):
            order = torch.randperm(count, generator=rng)
            for rows in order[: count // batch * batch].split(batch):
                view = torch.randint(views.shape[0], (batch,), generator=rng)
                said = torch.randint(texts.shape[1], (batch,), generator=rng)
                text = texts[rows, said]
                loss = _loss(head.pictures(views[view, rows]), head.prompts(text), text, scale, recipe.same)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
    return head.eval().requires_grad_(False)


def _loss(pictures: Tensor, prompts: Tensor, text: Tensor, scale: Tensor, same: float) -> Tensor:
    """Cross-entropy both ways; captions closer than `same` share the target evenly."""
    logits = pictures @ prompts.T * scale.clamp(max=4.6).exp()  # at most 100, as in CLIP
    target = (text @ text.T > same).float().fill_diagonal_(1.0)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def held_out_names(names: Sequence[str], count: int = HELD_OUT) -> list[str]:
    """The names of the test pictures: `count` of the different names, drawn with seed 0."""
    return random.Random(0).sample(sorted(set(names)), count)


def measure(head: Head, found: Tensor, names: Sequence[str]) -> dict[str, float]:
    """R@1, R@5, R@10, and the mean cosine of matched and mismatched pairs, for features [N, 1280] and their names."""
    scores, own = own_scores(found, names, head)
    matched = scores[torch.arange(len(own)), own]
    others = (scores.sum(1) - matched) / (scores.shape[1] - 1)
    result = {f"r_at_{k}": recall(scores, own, k) for k in (1, 5, 10)}
    return result | {"matched": float(matched.mean()), "mismatched": float(others.mean())}


def report(training: Pairs, test: Pairs, seeds: Iterable[int]) -> list[str]:
    """Lines of the model card: each seed, with the test's names seen in other styles and with them left out."""
    wanted = held_out_names(test.names)
    place = {name: i for i, name in enumerate(test.names)}
    rows = torch.tensor([place[name] for name in wanted])
    unseen = torch.tensor([name not in set(wanted) for name in training.names])
    lines = []
    for seed in seeds:
        for what, keep in (("seen", torch.ones_like(unseen)), ("left out", unseen)):
            head = fit_head(training.views[:, keep], training.captions[keep], seed)
            for view, pixels in ((0, "sharp"), (1, "64 px")):
                numbers = measure(head, test.views[view, rows], wanted)
                cells = " | ".join(f"{value:.3f}" for value in numbers.values())
                lines.append(f"| {seed} | {what} | {pixels} | {cells} |")
    return lines


def main() -> None:
    """Fetch, extract, fit, test, write."""
    parser = argparse.ArgumentParser(description="Fit the alignment head of the image metrics.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="folder of the archives")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the head that is written")
    parser.add_argument("--report", type=int, default=0, metavar="N", help="also test N seeds, and print the table")
    given = parser.parse_args()
    training = make_pairs([r for style in TRAINING_STYLES for r in read_records(style, given.cache)])
    print(f"{len(training.names)} training pictures")
    if given.report:
        test = make_pairs(read_records(TEST_STYLE, given.cache))
        print("\n".join(report(training, test, range(given.report))))
    save_head(fit_head(training.views, training.captions, given.seed), given.out)
    print(f"Wrote {given.out}")


if __name__ == "__main__":
    main()
