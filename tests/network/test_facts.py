"""Blocks and parts are found by structure, in the order in which they run, for the classes of the library."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from suite.network import BlockRef, Network
from suite.network.facts import carried, discover

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
import _tiny

EXPECTED = {
    "pixart": {"block": 3, "attention": 3, "cross_attention": 3, "mlp": 3},
    "dit": {"block": 3, "attention": 3, "mlp": 3},
    # The last block of an MMDiT ends the text: it has no MLP for it.
    "sd3": {"block": 3, "attention": 3, "mlp": 5},
    "sd3.5": {"block": 3, "attention": 4, "mlp": 5},
    # A single block's MLP is two bare layers, not a part of its own.
    "flux": {"block": 5, "attention": 5, "mlp": 4},
    "unet": {"block": 4, "attention": 4, "cross_attention": 4, "mlp": 4, "down": 2, "mid": 1, "up": 2},
    "wan": {"block": 3, "attention": 3, "cross_attention": 3, "mlp": 3},
    "cogvideox": {"block": 3, "attention": 3, "mlp": 3},
    "stable-audio": {"block": 3, "attention": 3, "cross_attention": 3, "mlp": 3},
}
#: Of the further classes: what goes over frames is told apart by the lists it is kept in.
MORE = {
    "latte": {"block": 6, "attention": 3, "cross_attention": 3, "temporal_attention": 3, "mlp": 6},
    "unet-motion": {"block": 11, "attention": 4, "cross_attention": 4, "temporal_attention": 14, "mlp": 11, "down": 2,
                    "mid": 1, "up": 2},
    "unet-bare": {"down": 3, "up": 3},
    "masked-lm": {"block": 3, "attention": 3, "mlp": 3},
}  # fmt: skip
TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
HIDDEN = {"sd3": TEXT_FIRST, "sd3.5": TEXT_FIRST, "flux": TEXT_FIRST, "cogvideox": TEXT_FIRST[::-1]}


@pytest.mark.parametrize("name", [*EXPECTED, *MORE])
def test_counts(name: str) -> None:
    refs = _tiny.Setup(name).network.blocks()
    assert Counter(ref.kind for ref in refs) == {**EXPECTED, **MORE}[name]
    assert all(dict(_tiny.module_of(name).named_modules())[ref.name] is ref.module for ref in refs)


@pytest.mark.parametrize("name", EXPECTED)
def test_hidden_states_are_named_in_the_order_of_the_outputs(name: str) -> None:
    network = _tiny.Setup(name).network
    assert {ref.hidden for ref in network.blocks("block")} == {HIDDEN.get(name, ("hidden_states",))}
    assert not any(ref.hidden for ref in network.blocks() if ref.kind != "block")


@pytest.mark.parametrize("name", EXPECTED)
@torch.inference_mode()
def test_outputs_continue_the_hidden_states(name: str) -> None:
    """Each block is given what the one before returned, under the names that `hidden` says."""
    setup = _tiny.Setup(name, steps=1)
    seen: list[tuple[BlockRef, dict[str, Tensor], tuple[Tensor, ...]]] = []

    def record(ref: BlockRef, args: tuple, kwargs: dict, output: object) -> None:
        given = {**dict(zip(_names(ref), args, strict=False)), **kwargs}
        states = output if isinstance(output, tuple) else (output,)
        seen.append((ref, given, states))

    hooks = [
        ref.module.register_forward_hook(lambda m, a, k, o, ref=ref: record(ref, a, k, o), with_kwargs=True)
        for ref in setup.network.blocks("block")
    ]
    setup.generate()
    for hook in hooks:
        hook.remove()
    assert [ref for ref, _, _ in seen] == list(setup.network.blocks("block"))
    for ref, given, states in seen:
        assert len(states) == len(ref.hidden)
        assert all(s is None or s.shape == given[n].shape for s, n in zip(states, ref.hidden, strict=True))
    if name != "unet":  # between the blocks of a U-Net other layers run
        for (_, _, before), (ref, given, _) in pairwise(seen):
            assert all(torch.equal(s, given[n]) for s, n in zip(before, ref.hidden, strict=True))


def _names(ref: BlockRef) -> list[str]:
    code = type(ref.module).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


@pytest.mark.parametrize("name", [*EXPECTED, "latte"])
def test_parts_come_in_the_order_in_which_they_run(name: str) -> None:
    setup = _tiny.Setup(name, steps=1)
    for kind in {**EXPECTED, **MORE}[name]:
        with _tiny.counting(setup.network, kind) as seen:
            setup.generate()
        assert seen.order == [ref.name for ref in setup.network.blocks(kind)]


def test_a_unet_runs_its_middle_before_its_way_up() -> None:
    kinds = [ref.kind for ref in _tiny.Setup("unet").network.blocks("down", "mid", "up")]
    assert kinds == ["down", "down", "mid", "up", "up"]


@pytest.mark.parametrize("name", ["latte", "unet-motion"])
@torch.inference_mode()
def test_temporal_attention_goes_over_frames(name: str) -> None:
    """Each has as many positions as there are frames, 3, and the others have those of one frame."""
    setup, lengths = _tiny.Setup(name, steps=1), {}
    kinds = ("attention", "temporal_attention")
    hooks = [
        ref.module.register_forward_hook(
            lambda m, a, k, o, ref=ref: lengths.setdefault(ref.kind, set()).add(o.shape[1]), with_kwargs=True
        )
        for ref in setup.network.blocks(*kinds)
    ]
    setup.generate()
    for hook in hooks:
        hook.remove()
    assert lengths["temporal_attention"] == {3} and 3 not in lengths["attention"]


def test_a_transformer_inside_a_unet() -> None:
    inner = _tiny.module_of("unet").get_submodule("mid_block.attentions.0")
    found = [(ref.kind, ref.name) for ref in Network(inner).blocks()]
    start = "transformer_blocks.0"
    parts = [("attention", ".attn1"), ("cross_attention", ".attn2"), ("mlp", ".ff")]
    assert found == [("block", start), *((kind, start + name) for kind, name in parts)]


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_a_replaced_forward_changes_nothing(name: str) -> None:
    network = _tiny.Setup(name).network
    plain = network.blocks()
    with _tiny.counting(network):
        assert network.blocks() == plain


def test_declared_blocks_win() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    ref = BlockRef("0", module[0], "mlp")
    assert Network(module, declared=(ref,)).blocks() == (ref,)
    assert Network(module, declared=(ref,)).blocks("block") == ()


def test_a_network_without_known_parts() -> None:
    assert list(discover(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(2, 2)


class Mine(nn.Module):
    """A block of other people's: the state is called `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ffn = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.attn.to_q(x) + time
        return x


def test_a_block_may_call_its_state_otherwise() -> None:
    module = nn.Module()
    module.layers = nn.ModuleList([Mine(), Mine()])
    # Outside of a list an MLP is an embedding, not a repeated part.
    module.mlp = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refs = Network(module).blocks()
    assert [ref.kind for ref in refs] == ["block", "attention", "mlp"] * 2
    assert refs[0].hidden == ("x",)


class Early(nn.Module):
    def forward(self, hidden_states: Tensor, context: Tensor, split: bool = False) -> object:
        if split:
            return context, hidden_states
        return hidden_states


class Unsaid(nn.Module):
    def forward(self, hidden_states: Tensor, control: Tensor) -> object:
        changed = hidden_states + control
        return changed, control


def test_carried_states() -> None:
    assert carried(Early) == ("context", "hidden_states")
    assert carried(Unsaid) == ("hidden_states",)
    assert carried(nn.Linear) == ()


def test_layers_and_bytes() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv1d(3, 4, 1, bias=False))
    network = Network(module)
    assert [name for name, _ in network.layers()] == ["0", "2"]
    assert network.bytes() == 4 * (2 * 3 + 3 + 3 * 4)


def _bert(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    common = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
              "num_attention_heads": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**common)).eval()
    kinds = {"layer_types": ["full_attention"] * 3}
    others = dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**common, **kinds, **others)).eval()


# BERT's MLP is two modules with the sum after them, not a part of its own.
BERTS = {"modernbert": {"block": 3, "attention": 3, "mlp": 3}, "bert": {"block": 3, "attention": 3}}


@pytest.mark.parametrize("name", BERTS)
def test_blocks_of_transformers_bidirectional_classes(name: str) -> None:
    refs = Network(_bert(name)).blocks()
    assert Counter(ref.kind for ref in refs) == BERTS[name]
    assert {ref.hidden for ref in refs if ref.kind == "block"} == {("hidden_states",)}


@pytest.mark.parametrize("name", BERTS)
@torch.inference_mode()
def test_a_block_of_these_classes_continues_the_one_before(name: str) -> None:
    module, seen = _bert(name), []
    refs = Network(module).blocks("block")
    for ref in refs:
        ref.module.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((kwargs.get("hidden_states", args[0] if args else None), out)),
            with_kwargs=True,
        )
    module(torch.arange(8)[None])
    assert len(seen) == 3 and all(isinstance(out, Tensor) for _, out in seen)
    assert all(torch.equal(after[0], before[1]) for before, after in pairwise(seen))
