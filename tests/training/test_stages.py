"""Training in stages equals the same runs by hand, resumes in the middle, and is refused when it makes no sense."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch import equal, lerp

from suite.errors import ConfigError
from suite.modalities.image import training as image_training
from suite.training.checkpoint import latest
from suite.training.stages import in_stages, stages_of

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "image" / "samples.safetensors"
SHIPPED = ROOT / "configs" / "training" / "image-64-shipped.yaml"
SMALL = [
    "model.num_layers=1",
    "model.num_attention_heads=1",
    "model.cross_attention_dim=64",
    "train.log_every=1",
    "train.warmup=1",
    "train.precision=fp32",
    "train.compile=false",
    "batch=2",
    "sheet=[sunset]",
]


def written(folder: Path, **changes: object) -> Path:
    tree = yaml.safe_load(SHIPPED.read_text()) | {"styles": {"3d": 1.0}} | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def three_stages(folder: Path) -> Path:
    train = yaml.safe_load(SHIPPED.read_text())["train"] | {"steps": 6, "until": 2}
    last = {"train.since": 3, "train.steps": 5, "train.lr": 0.0004, "train.average": 0.4}
    return written(folder, train=train, stages=[{"train.until": 3, "train.steps": 4}, last])


def log(run: Path) -> list[list[str]]:
    return [line.split(",")[:3] for line in (run / "loss.csv").read_text().split()]


def weights(folder: Path):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_stages_equal_the_same_runs_by_hand(tmp_path: Path):
    pytest.importorskip("diffusers")
    recipe = three_stages(tmp_path)
    staged = image_training.train(recipe, SAMPLES, tmp_path / "staged", overrides=SMALL)
    hand = tmp_path / "hand"
    by_hand = unwrap(image_training.train)
    by_hand(recipe, SAMPLES, hand, False, SMALL)
    by_hand(recipe, SAMPLES, hand, True, [*SMALL, "train.until=3", "train.steps=4"])
    last = ["train.until=0", "train.since=3", "train.steps=5", "train.lr=0.0004", "train.average=0.4"]
    model = by_hand(recipe, SAMPLES, hand, True, [*SMALL, *last])
    assert log(tmp_path / "staged") == log(hand) and len(log(hand)) == 6
    assert all(equal(a, weights(model)[n]) for n, a in weights(staged).items())
    # The kept weights are the mixture that the last stage asks for, and neither of its ends.
    folder = latest(hand)
    own, mean = load_file(folder / "network.safetensors"), load_file(folder / "ema.safetensors")
    for name, kept in weights(model).items():
        assert equal(kept, lerp(own[name], mean[name], 0.4).half())
    assert any(not equal(kept, mean[name].half()) for name, kept in weights(model).items())
    # Rates as each stage says: the cosine of 6 steps, then of 4, then a new one from step 3 with another top.
    rates = [float(row[2]) for row in log(hand)[1:]]
    assert rates[3] == pytest.approx(0.0004, rel=1e-2) and rates[4] < rates[3] < rates[2] < rates[1]


def test_a_stopped_run_goes_on_in_its_stage(tmp_path: Path):
    pytest.importorskip("diffusers")
    recipe = three_stages(tmp_path)
    whole = image_training.train(recipe, SAMPLES, tmp_path / "whole", overrides=SMALL)
    parts = tmp_path / "parts"
    unwrap(image_training.train)(recipe, SAMPLES, parts, False, SMALL)
    unwrap(image_training.train)(recipe, SAMPLES, parts, True, [*SMALL, "train.until=3", "train.steps=4"])
    model = image_training.train(recipe, SAMPLES, parts, resume=True, overrides=SMALL)
    assert log(tmp_path / "whole") == log(parts)
    assert all(equal(a, weights(model)[n]) for n, a in weights(whole).items())


def test_what_stops_a_stage_stops_the_rest(tmp_path: Path):
    calls = []

    @in_stages
    def train(config, data, out, resume, overrides, minutes):
        calls.append((resume, minutes is None, len(overrides)))
        return Path(out)  # no checkpoint: as after Ctrl-C before the first

    train(three_stages(tmp_path), SAMPLES, tmp_path / "out")
    train(three_stages(tmp_path), SAMPLES, tmp_path / "out", minutes=1e-9)
    assert calls == [(False, True, 0)]


def test_the_shipped_recipe_is_what_the_card_tells():
    stages = stages_of(SHIPPED)
    assert [until for _, until in stages] == [4000, 4750, 7000, 8500, 9250, 12000, 0]
    last = image_training.read(SHIPPED, stages[-1][0])
    assert (last.train.since, last.train.end, last.train.average) == (12000, 12450, 0.4)
    assert sum(last.styles.values()) == pytest.approx(1) and last.styles["composed"] == 0.12
    first = image_training.read(SHIPPED)
    assert first.train.end == 4000 and "composed" not in first.styles
    assert all(image_training.read(SHIPPED, settings).model == first.model for settings, _ in stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("soon", "expected a list of settings"),
        ([3], "expected a list of settings"),
        ([{"train.until": 3}, {"train.until": 2}, {}], "rising; got \\[4000, 3, 2\\]"),
        ([{"train.lr": 1.0}, {}], "rising; got \\[4000, 0\\]"),
    ],
)
def test_stages_that_make_no_sense(stages: object, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        stages_of(written(tmp_path, stages=stages))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.until=7000", "train.until 7000: expected steps up to train.steps, 6500"),
        ("train.since=6500", "train.since is 6500"),
        ("train.average=1.5", "expected a share in"),
    ],
)
def test_settings_out_of_range(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        image_training.read(SHIPPED, [override])
