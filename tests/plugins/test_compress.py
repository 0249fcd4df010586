"""compress: int8 weights, on the tiny networks of the classes that people bring."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.host.discovery import Entry
from suite.host.manager import Active, Manager
from suite.kernels.int8_linear import Int8Linear
from suite.network import Network
from suite.plugins.compress.int8 import Int8
from suite.testing import Check, Tiny, parametrize_with_checks
from suite.wrap import WrapReport

SMALL = 8


def a_manager(plugin: Int8) -> Manager:
    entry = Entry("int8", "suite.plugins.compress.int8:Int8", "under test", "0")
    return Manager([Active(entry, plugin, "compress", "int8")])


def compressed(module: nn.Module, plugin: Int8) -> tuple[Any, Callable[[], WrapReport]]:
    tiny = Tiny(module)
    wrap = tiny.wrap(a_manager(plugin), "compress")
    assert wrap is not None and wrap.network is not None and wrap.undo is None
    return wrap.network(module), wrap.report


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@parametrize_with_checks(
    {
        "int8-all": Int8(min_features=SMALL),
        "int8-onednn": Int8(min_features=SMALL, compute="onednn"),
        "int8-fp32": Int8(min_features=SMALL, compute="fp32"),
    }
)
def test_conformance(check: Check) -> None:
    check()


def test_hook_compress() -> None:
    """Through the host: layers are replaced, the picture stays, the report says what was saved."""
    tiny = Tiny.build()
    plain = tiny.generate((0, 1)).x0
    other = tiny.copy()
    wrap = other.wrap(a_manager(Int8(min_features=SMALL)), "compress")
    outcome = other.generate((0, 1), wrap)
    assert relative(outcome.x0, plain) < 0.05
    report = outcome.report
    assert report is not None
    layers = [m for m in other.module.modules() if isinstance(m, Int8Linear)]
    assert report.did == len(layers) > 0
    facts = report.facts
    assert facts["ratio"] <= 0.40  # scales and biases weigh more in a width of 32
    assert facts["bytes_after"] == sum(m.nbytes() for m in layers)
    assert 0 < facts["error_mean"] <= facts["error_max"] < 0.01
    assert sum(n for count in facts["paths"].values() for n in count.values()) == report.did
    assert "not called" not in str(facts["paths"])
    assert facts["skipped"]["named in skip"] >= 3


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.30), (torch.bfloat16, 0.55)])
def test_memory_of_the_linear_layers(dtype: torch.dtype, most: float) -> None:
    module = nn.ModuleList([nn.Linear(256, 512), nn.Linear(512, 256)]).to(dtype)
    before = sum(p.untyped_storage().nbytes() for p in module.parameters())
    out, report = compressed(nn.ModuleDict({"blocks": module}), Int8())
    after = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in out.state_dict().values()}.values()
    )
    assert after <= most * before
    assert (report().facts["bytes_before"], report().facts["bytes_after"]) == (before, after)
    assert Network(out).bytes() == after


def test_old_weights_are_let_go() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    old = [weakref.ref(m.weight) for m in module.children()]
    _, report = compressed(module, Int8())
    gc.collect()
    assert report().did == 2
    assert all(ref() is None for ref in old)


# ---- networks ----------------------------------------------------------------------------------


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from suite.testing.tiny import pixart as build

    extra = {"resolution": None, "aspect_ratio": None}
    inputs = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 16)}
    return build(), {**inputs, "timestep": torch.tensor([3.0, 7.0]), "added_cond_kwargs": extra}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    labels, times = torch.tensor([1, 2]), torch.tensor([3, 7])
    return module, {"hidden_states": (2, 4, 8, 8), "timestep": times, "class_labels": labels}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 64)}
    return module, {**inputs, "timestep": torch.tensor([3.0, 7.0])}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 32)}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return module, {**inputs, **ids, "timestep": torch.tensor([0.3, 0.7])}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    return module, {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "timestep": torch.tensor([3, 7])}


def run_network(module: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Shapes stand for random tensors of the network's dtype."""
    generator = torch.Generator().manual_seed(0)
    made = {k: torch.randn(v, generator=generator).to(dtype) if isinstance(v, tuple) else v for k, v in inputs.items()}
    with torch.inference_mode():
        return module(**made, return_dict=False)[0]


@pytest.mark.parametrize("skip", [None, ("*.none.*",)], ids=["default-skip", "skip-nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", [pixart, dit, sd3, flux, unet])
def test_networks_of_diffusers_run(
    build: Callable[[], tuple[nn.Module, dict[str, Any]]], dtype: torch.dtype, skip: tuple[str, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also with the time and text embedders in int8: some of them ask for the dtype of a weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, inputs = build()
    module = module.to(dtype).eval().requires_grad_(False)
    plain = run_network(module, inputs, dtype)
    if skip:
        monkeypatch.setattr("suite.plugins.compress.int8.SKIP", skip)
    options = Int8(min_features=SMALL) if skip is None else Int8(min_features=1, skip=skip)
    out, report = compressed(copy.deepcopy(module), options)
    got = run_network(out, inputs, dtype)
    assert report().did >= 6
    assert got.dtype is plain.dtype is dtype
    assert relative(got, plain) < 0.06
    if skip:
        assert not [name for name, m in out.named_modules() if type(m) is nn.Linear]


# ---- what is left alone ------------------------------------------------------------------------


def test_small_layers_are_left_alone_and_it_says_why() -> None:
    tiny = Tiny.build()
    plain = tiny.generate().x0
    wrap = tiny.wrap(a_manager(Int8(min_features=4096)), "compress")
    outcome = tiny.generate(wrap=wrap)
    assert torch.equal(outcome.x0, plain)
    report = outcome.report
    assert report is not None and report.did == 0
    assert "smaller than min_features = 4096" in report.reason and "named in skip" in report.reason


def test_a_network_without_linear_layers() -> None:
    _, report = compressed(nn.Sequential(nn.Conv2d(3, 3, 3)), Int8())
    assert report().did == 0 and "no linear layers" in report().reason


def test_shared_hooked_and_derived_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    module = nn.ModuleDict(
        {
            "tied": nn.Linear(64, 64),
            "table": nn.Embedding(64, 64),
            "hooked": nn.Linear(64, 64),
            "own": Own(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
            "plain": nn.Linear(64, 64),
        }
    )
    module["tied"].weight = module["table"].weight
    module["hooked"].register_forward_hook(lambda *a: None)
    out, report = compressed(module, Int8())
    assert [name for name, m in out.named_modules() if isinstance(m, Int8Linear)] == ["plain"]
    assert report().did == 1 and sum(report().facts["skipped"].values()) == 4
    out["attention"](*[torch.zeros(2, 1, 64)] * 3)


def test_one_layer_at_two_places_stays_one() -> None:
    layer = nn.Linear(64, 64)
    out, report = compressed(nn.ModuleDict({"a": layer, "b": layer}), Int8())
    assert report().did == 1 and isinstance(out["a"], Int8Linear) and out["a"] is out["b"]


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"skip = 'blocks\.\*' matches no linear layer"):
        compressed(nn.Sequential(nn.Linear(64, 64)), Int8(skip=("blocks.*",)))


def test_broken_weights_are_named() -> None:
    layer = nn.Linear(64, 64)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layer 0: .*int8:skip=0"):
        compressed(nn.Sequential(layer), Int8())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_features = 0"):
        Int8(min_features=0)


def test_a_fallback_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.kernels.int8_linear.has_int8_products", lambda: False)
    _, report = compressed(nn.Sequential(nn.Linear(64, 64)), Int8(compute="onednn"))
    assert report().facts["fallbacks"] == {"this CPU has no int8 dot products": 1}
    assert report().facts["paths"] == {"64x64": {"fp32": 1}}
