"""The video recipe: what a run begins with, what it is fed, and that a short one gives a model that opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `video` is not installed")

from suite import Engine
from suite.errors import ConfigError
from suite.modalities.shared.caption_table import named_captions
from suite.modalities.video import training
from suite.modalities.video.config import VideoTraining, read
from suite.modalities.video.data import load
from suite.modalities.video.network import begin_with_image, call
from suite.network.weights import load_network
from suite.recipe import Recipe

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "video" / "samples.safetensors"
SHIPPED = ROOT / "configs" / "training" / "video-64.yaml"
TINY = (
    "model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=16", "model.cross_attention_dim=32",
    "start=''", "batch=2", "train.steps=2", "train.compile=false", "train.warmup=1", "train.sample_every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load(SAMPLES)


def test_shipped_recipes_are_valid():
    found = sorted((ROOT / "configs" / "training").glob("video-*.yaml"))
    assert len(found) >= 2
    for path in found:
        config = read(path)
        with torch.device("meta"):
            training.build(config)
        assert training.description(config)["shape"] == list(config.shape)


def test_it_begins_as_the_image_model_standing_still():
    """Every tube is then what the image model makes of it, and tubes do not see each other."""
    config = read(SHIPPED)
    torch.manual_seed(0)
    network = training.build(config).eval()
    weights = training.weights_of(config.start)
    begin_with_image(network, weights)
    network = network.double()  # random states drive the activations high, where float32 has no digits to compare
    network.temp_pos_embed.zero_()  # the class adds it between two blocks: the one thing the start cannot undo
    image = load_network(weights.parent, "cpu", torch.float32).double()
    x, states = torch.randn(1, *config.shape).double(), torch.randn(1, 24, 384).double()
    mask = (torch.arange(24) < 7).double()[None]
    with torch.inference_mode():
        got = call(network, x, torch.tensor([300.0], dtype=x.dtype), states, mask)
        frames = x[0, :3].transpose(0, 1)
        want = image(
            frames, timestep=torch.full((4,), 300.0, dtype=x.dtype), encoder_hidden_states=states.expand(4, -1, -1),
            encoder_attention_mask=mask.expand(4, -1), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
    torch.testing.assert_close(got[0, :3].transpose(0, 1), want, atol=1e-6, rtol=1e-6)
    assert got[0, 3:].abs().max() == 0


def test_a_start_that_does_not_fit_is_an_error():
    network = training.build(read(SHIPPED, ["model.num_layers=7"]))
    with pytest.raises(ConfigError, match="does not fit as a start"):
        begin_with_image(network, training.weights_of("emoji-64"))
    with pytest.raises(ConfigError, match="has no transformer"):
        training.weights_of("emoji-unet-32")


def test_padding_is_not_seen():
    network = training.build(read(SHIPPED, TINY)).eval()
    x, states = torch.randn(1, 24, 4, 64, 64), torch.randn(1, 8, 384)
    mask = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]])
    other = torch.where(mask[..., None] > 0, states, torch.randn(1, 8, 384))
    time = torch.tensor([500.0])
    with torch.inference_mode():
        a, b, c = (call(network, x, time, s, m) for s, m in ((states, mask), (other, mask), (other, mask * 0 + 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_draws_are_rolled_loops_of_the_data(data):
    batches = training.make_batches(data, read(SHIPPED), torch.device("cpu"))
    clips, text = batches.draw(16, 0.5, torch.Generator().manual_seed(0))
    assert clips.shape == (16, 4, 24, 64, 64) and text.states.shape == (16, 24, 384)
    real = data.clips.transpose(1, 2)
    starts = set()
    for clip in ((clips + 1) * 127.5).round().to(torch.uint8):
        matches = [
            (n, k) for n, whole in enumerate(real) for k in range(24)
            if torch.equal(clip[:, 0], whole[:, k]) and torch.equal(clip, whole.roll(-k, 1))
        ]  # fmt: skip
        assert matches
        starts.add(matches[0][1])
    assert len(starts) > 5
    assert 2 <= int((text.mask.sum(1) == 2).sum()) <= 14  # the dropped ones keep two marks


def test_loss_of_a_perfect_network_is_zero_and_of_none_is_the_data(data):
    config = read(SHIPPED)
    batches = training.make_batches(data, config, torch.device("cpu"))
    seen = {}

    class Zero(torch.nn.Module):
        def forward(self, x, **_):
            seen["x"] = x
            return (torch.zeros_like(x),)

    value = training.flow_loss(batches, config)(Zero(), torch.Generator().manual_seed(3))
    assert seen["x"].shape == (config.batch, *config.shape) and 0.1 < value < 100


def test_wrong_clips_and_settings_are_errors(data):
    with pytest.raises(ConfigError, match=r"the model \[12, 4, 64, 64\]"):
        training.make_batches(data, VideoTraining("x", {}, (4, 12, 64, 64)), torch.device("cpu"))
    with pytest.raises(ConfigError, match="a divisor of the clip's 24 frames"):
        read(SHIPPED, ["tube=5"])
    with pytest.raises(ConfigError, match=r"model\.video_length is 3"):
        training.build(read(SHIPPED, ["model.video_length=3"]))
    with pytest.raises(ConfigError, match="no caption 'a purple cow'"):
        named_captions(data.captions, ("a purple cow",), 8)


def test_a_short_run_gives_a_model_that_generates(tmp_path: Path):
    folder = training.train(SHIPPED, SAMPLES, tmp_path / "run", overrides=TINY)
    assert json.loads((folder / "suite.json").read_text())["codec"]["length"] == 6
    assert list((tmp_path / "run").glob("samples-*.png")) and (folder / "loss.csv").is_file()
    with Engine.from_recipe(Recipe(steps=2, dtype="fp32"), modality="video", model=str(folder)) as engine:
        (clip,) = engine.generate("a butterfly", options={"frames": 5}).artifacts
    assert clip.colour.shape == (5, 64, 64, 3) and clip.opacity.shape == (5, 64, 64)


def test_large_weights_are_split_and_open_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SHARD", "200KB")
    config = read(SHIPPED, TINY)
    torch.manual_seed(0)
    network = training.build(config)
    folder = training.export(network.state_dict(), config, tmp_path / "model")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    again = load_network(folder / "transformer", "cpu", torch.float32).state_dict()
    assert all(torch.equal(v.half().float(), again[k]) for k, v in network.state_dict().items())
    first = sorted((folder / "transformer").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:99])
    with pytest.raises(ConfigError, match="damaged or incomplete"):
        load_network(folder / "transformer", "cpu", torch.float32)
