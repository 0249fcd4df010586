"""The training loop and the image recipe: exact resumption, safe checkpoints, the pairing of noise."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from suite.errors import ConfigError, OutputError
from suite.modalities.image import training as image_training
from suite.modalities.image.config import ImageTraining, read
from suite.modalities.image.data import load
from suite.modalities.image.training import make_batches, resized
from suite.modalities.shared.caption_table import named_captions
from suite.modalities.shared.flow import assign
from suite.training import checkpoint
from suite.training.attention import attention, attention_for
from suite.training.checkpoint import latest
from suite.training.loop import TrainOptions, averaged, begin, generator_for, learning_rate, train

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "image" / "samples.safetensors"
OPTIONS = TrainOptions(steps=4, precision="fp32", compile=False, warmup=2, save_every=100, log_every=1, lr=1e-2)


class Tiny(nn.Module):
    """Two matrices in a block, one outside; dropout, so that the global random stream matters too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))])
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks[0](x))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def loss(network: nn.Module, rng: torch.Generator) -> torch.Tensor:
    x = torch.randn(16, 4, generator=rng)
    return (network(x) - x.roll(1, 1)).square().mean()


def run(out: Path, options: TrainOptions = OPTIONS, **more):
    return train(tiny(), more.pop("loss", loss), options, out, device="cpu", **more)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_equals_uninterrupted(optimizer: str, tmp_path: Path):
    options = replace(OPTIONS, optimizer=optimizer)
    whole = run(tmp_path / "whole", options)

    def stop_after_two(network: nn.Module, rng: torch.Generator) -> torch.Tensor:
        stop_after_two.calls += 1
        if stop_after_two.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(network, rng)

    stop_after_two.calls = 0
    half = run(tmp_path / "parts", options, loss=stop_after_two)
    assert half.interrupted and half.step == 2
    assert latest(tmp_path / "parts").name == "checkpoint-00000002"
    parts = run(tmp_path / "parts", options, resume=True)
    assert parts.step == 4 and not parts.interrupted
    assert same(whole.network.state_dict(), parts.network.state_dict())
    assert same(whole.ema, parts.ema)
    # The log of the two runs is the same but for the clock.
    logs = [[r.split(",")[:3] for r in (tmp_path / d / "loss.csv").read_text().split()] for d in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 5


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, replace(OPTIONS, steps=2))
    before = {p.name: p.read_bytes() for p in latest(tmp_path).iterdir()}

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, resume=True)
    assert latest(tmp_path).name == "checkpoint-00000002"
    assert {p.name: p.read_bytes() for p in latest(tmp_path).iterdir()} == before
    monkeypatch.undo()
    assert run(tmp_path, resume=True).step == 4
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-00000004"]


def test_existing_run_and_missing_run_are_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="start without --resume"):
        run(tmp_path, resume=True)
    run(tmp_path)
    with pytest.raises(ConfigError, match="pass --resume"):
        run(tmp_path)
    with pytest.raises(ConfigError, match=r"train.seed=0, this run asks for 1"):
        run(tmp_path, replace(OPTIONS, seed=1), resume=True)


def test_damaged_checkpoint_is_an_error(tmp_path: Path):
    run(tmp_path, replace(OPTIONS, steps=2))
    path = latest(tmp_path) / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="does not fit this run or is damaged"):
        run(tmp_path, resume=True)


def test_nan_loss_stops_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="The loss is nan at step 1"):
        run(tmp_path, loss=lambda network, rng: loss(network, rng) * float("nan"))


def test_minutes_end_the_run_and_anneal(tmp_path: Path):
    assert run(tmp_path, replace(OPTIONS, steps=10**6), minutes=0.002).step < 10**6
    with pytest.raises(ConfigError, match="pass --minutes"):
        run(tmp_path / "b", replace(OPTIONS, anneal="minutes"))


def test_samples_see_averaged_weights_and_leave_no_trace(tmp_path: Path):
    seen = []

    def samples(network: nn.Module, step: int) -> None:
        seen.append((step, network.training, network.out.weight.clone()))

    with_sheets = run(tmp_path / "a", replace(OPTIONS, sample_every=2), samples=samples)
    assert [step for step, _, _ in seen] == [2, 4, 4] and not any(mode for _, mode, _ in seen)
    assert torch.equal(seen[-1][2], with_sheets.ema["out.weight"])
    assert same(with_sheets.network.state_dict(), run(tmp_path / "b").network.state_dict())


def test_averaged_restores_after_an_error():
    state = begin(tiny(), OPTIONS)
    state.ema["out.bias"].add_(1)
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    with pytest.raises(RuntimeError), averaged(state) as network:
        assert torch.equal(network.out.bias, state.ema["out.bias"])
        raise RuntimeError
    assert same(before, state.network.state_dict()) and state.network.training


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_equals_pytorchs_and_its_gradients_too(mask: str | None):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7)]
    keep = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    given = {None: None, "bool": keep, "float": torch.where(keep, 0.0, -1e4).double()}[mask]
    results = []
    for function in (attention, torch.nn.functional.scaled_dot_product_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in draw]
        out = function(*inputs, attn_mask=given)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_training_on_a_cpu_changes_attention():
    fused = torch.nn.functional.scaled_dot_product_attention
    with attention_for(torch.device("cuda")):
        assert torch.nn.functional.scaled_dot_product_attention is fused
    with attention_for(torch.device("cpu")):
        assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.nn.functional.scaled_dot_product_attention is fused


def test_muon_gets_the_matrices_of_the_blocks():
    adamw, muon = begin(tiny(), replace(OPTIONS, optimizer="muon")).optimizers
    assert [tuple(p.shape) for g in muon.param_groups for p in g["params"]] == [(8, 4), (4, 8)]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 4
    with pytest.raises(ConfigError, match="choose adamw"):
        begin(nn.Linear(2, 2), replace(OPTIONS, optimizer="muon"))


def test_learning_rate_shape():
    options = replace(OPTIONS, steps=1000, warmup=10, lr_floor=0.02)
    assert learning_rate(0, options) == pytest.approx(0.1)
    assert learning_rate(500, options) == pytest.approx(0.51)
    assert learning_rate(1000, options) == pytest.approx(0.02)
    assert learning_rate(500, options, done=1.0) == pytest.approx(0.02)
    rates = [learning_rate(step, options) for step in range(10, 1001)]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_streams_differ_by_seed_step_and_process():
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    draws = [torch.rand(1, generator=generator_for(s, n, torch.device("cpu"), p)).item() for s, n, p in keys]
    assert len(set(draws)) == 4


# --- pairing of noise ----------------------------------------------------------------------------


def cost(x0: torch.Tensor, noise: torch.Tensor) -> float:
    return (x0 - noise).double().square().sum().item()


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 17])
def test_immiscible_assignment(batch: int):
    pytest.importorskip("scipy")
    rng = torch.Generator().manual_seed(batch)
    x0, noise = torch.randn(batch, 3, 4, 4, generator=rng), torch.randn(batch, 3, 4, 4, generator=rng)
    order = assign(x0, noise)
    assert sorted(order.tolist()) == list(range(batch))
    assert cost(x0, noise[order]) <= cost(x0, noise) + 1e-9
    if batch <= 5:
        best = min(cost(x0, noise[list(p)]) for p in itertools.permutations(range(batch)))
        assert cost(x0, noise[order]) == pytest.approx(best, rel=1e-12)
    if batch == 1:
        assert order.tolist() == [0]


# --- the image recipe ----------------------------------------------------------------------------


def test_shipped_recipes_are_valid():
    pytest.importorskip("diffusers")
    found = sorted((ROOT / "configs" / "training").glob("image-*.yaml"))
    assert len(found) >= 3
    for path in found:
        config = read(path)
        with torch.device("meta"):
            image_training.build(config)
        assert image_training.description(config)["shape"] == list(config.shape)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("train.steps=many", "train.steps is 'many', expected int"),
        ("train.steps=1.5", "train.steps is 1.5, expected int"),
        ("train.compile=3", "train.compile is 3, expected bool"),
        ("train.optimizer=sgd", "expected one of adamw, muon"),
        ("network=gan", "expected transformer or unet"),
        ("batch", "not of the form key=value"),
        ("model.depth=3", "refuses these settings"),
    ],
)
def test_wrong_settings_say_so(override: str, message: str):
    pytest.importorskip("diffusers")
    with pytest.raises(ConfigError) as caught:
        image_training.build(read(ROOT / "configs" / "training" / "image-64.yaml", [override]))
    assert message in str(caught.value)


def test_overrides_reach_nested_keys():
    config = read(ROOT / "configs" / "training" / "image-64.yaml", ["train.lr=1e-3", "styles.flat=0", "batch=3"])
    assert (config.train.lr, config.styles["flat"], config.batch) == (1e-3, 0, 3)


@pytest.fixture(scope="module")
def samples():
    return load(SAMPLES)


def small(**changes) -> ImageTraining:
    return replace(ImageTraining("x", "transformer", {}, (3, 64, 64), batch=8), **changes)


def test_batches_draw_pictures_with_their_own_captions(samples):
    batches = make_batches(samples, small(), torch.device("cpu"))
    x0, text = batches.draw(64, 0.0, generator_for(0, 0, torch.device("cpu")))
    assert x0.shape == (64, 3, 64, 64) and x0.min() >= -1 and x0.max() <= 1
    known = ((samples.pictures.float() / 127.5 - 1)[None] == x0[:, None]).flatten(2).all(dim=2).float().argmax(dim=1)
    table = samples.states(range(len(samples.captions)))
    for picture, states in zip(known.tolist(), text.states, strict=True):
        assert any(torch.allclose(states, table.states[k], atol=5e-3) for k in samples.captions_of()[picture].tolist())


def test_dropped_captions_are_the_empty_prompt(samples):
    batches = make_batches(samples, small(), torch.device("cpu"))
    _, text = batches.draw(256, 0.5, generator_for(0, 0, torch.device("cpu")))
    null = samples.states([0])
    dropped = [torch.allclose(s, null.states[0], atol=5e-3) for s in text.states]
    assert 90 < sum(dropped) < 166
    assert torch.equal(text.mask[dropped.index(True)], null.mask[0])


def test_style_and_size_must_be_in_the_data(samples):
    with pytest.raises(ConfigError, match="no style 'flat', only 3d"):
        make_batches(samples, small(styles={"flat": 1.0}), torch.device("cpu"))
    assert resized(samples.pictures, 32).shape == (32, 3, 32, 32)
    with pytest.raises(ConfigError, match="prepare it with --size 48"):
        resized(samples.pictures, 48)
    with pytest.raises(ConfigError, match="no caption 'nothing'"):
        named_captions(samples.captions, ("nothing",), 8)


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_train_exports_a_model_folder(network: str, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    if network == "transformer":
        base = "image-64"
        changes = ["model.num_layers=1", "model.num_attention_heads=1", "model.cross_attention_dim=64"]
    else:
        base = "image-unet-32"
        changes = ["model.block_out_channels=[8,8,8]", "model.norm_num_groups=4", "model.layers_per_block=1"]
    changes += [
        "train.steps=2",
        "train.log_every=1",
        "train.compile=false",
        "batch=4",
        "styles={3d: 1}",
        "sheet=[sunset, peacock]",
    ]
    config = ROOT / "configs" / "training" / f"{base}.yaml"
    folder = image_training.train(config, SAMPLES, tmp_path, overrides=changes)
    facts = json.loads((folder / "suite.json").read_text())
    assert facts["network"] == network and facts["noise"] == {"family": "flow"} and facts["prediction"] == "sample"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["loss.csv", "model_index.json", "scheduler", "suite.json", network]
    )
    kind = diffusers.PixArtTransformer2DModel if network == "transformer" else diffusers.UNet2DConditionModel
    loaded = kind.from_pretrained(folder / network, torch_dtype=torch.float16)
    assert next(loaded.parameters()).dtype == torch.float16
    assert (tmp_path / "samples-000002.png").is_file()


def test_export_refuses_what_half_precision_cannot_hold(tmp_path: Path):
    with pytest.raises(ConfigError, match="float16 cannot hold"):
        image_training.export({"w": torch.tensor([1e6])}, small(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_full_disk_ends_a_run_with_the_cause_and_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, replace(OPTIONS, steps=2))
    kept = latest(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OutputError, match="could not be written: ") as caught:
            run(tmp_path, replace(OPTIONS, steps=6), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 2 and latest(tmp_path) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, "loss.csv"]
    assert run(tmp_path, replace(OPTIONS, steps=6), resume=True).step == 6


def test_a_log_that_was_cut_off_is_trimmed(tmp_path):
    run(tmp_path, replace(OPTIONS, steps=2))
    log = tmp_path / "loss.csv"
    log.write_text(log.read_text() + "1")
    run(tmp_path, replace(OPTIONS, steps=4), resume=True)
    assert [row.split(",")[0] for row in log.read_text().split()] == ["step", "1", "2", "3", "4"]
