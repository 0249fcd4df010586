"""`Network`: a module and the facts that plugins need, found by structure rather than by class name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

BLOCK, ATTENTION, CROSS, MLP, DOWN, MID, UP = (
    "block",
    "attention",
    "cross_attention",
    "mlp",
    "down",
    "mid",
    "up",
)


@dataclass(frozen=True)
class BlockRef:
    """One addressable part of a network.

    Attributes:
        name: dotted path in the module.
        module: the part itself.
        kind: block, attention, cross_attention, mlp, down, mid or up.
        hidden: names of the arguments that carry the hidden state, in the order in which the outputs
            return them; empty for parts that are not residual blocks.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: str
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Latent of one sample: [channels, (frames,) height, width] or [channels, length]; tokens per sample."""

    shape: tuple[int, ...]
    tokens: int = 0


@dataclass(frozen=True)
class Network:
    """A module with facts.

    Attributes:
        module: the network.
        layout: latent layout, if the modality told it.
        guidance_distilled: guidance is already inside; CFG must not be added.
        declared: block references that a modality gives itself; empty means automatic.
    """

    module: nn.Module
    layout: Layout | None = None
    guidance_distilled: bool = False
    declared: tuple[BlockRef, ...] = ()

    def blocks(self, *kinds: str) -> tuple[BlockRef, ...]:
        """References in execution order, of the given kinds (all if none is given)."""
        refs = self.declared or tuple(discover(self.module))
        return tuple(r for r in refs if not kinds or r.kind in kinds)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Linear and convolution layers, by dotted path."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                yield name, module

    def bytes(self) -> int:
        """Memory of parameters and buffers."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)


def discover(module: nn.Module) -> Iterator[BlockRef]:
    """Blocks and their parts in execution order.

    A `block` is a member of a ModuleList that takes the hidden state and holds attention; `down`, `mid`
    and `up` are the U-Net's stages; `attention`, `cross_attention` and `mlp` are the outermost modules of
    that kind, wherever they stand.
    """
    inside: list[str] = []
    for name, part in module.named_modules():
        if not name:
            continue
        if _is_stage(name):
            kind = name.split(".")[0].removesuffix("_blocks").removesuffix("_block")
            yield BlockRef(name, part, kind, ())
        if any(name.startswith(prefix + ".") for prefix in inside):
            continue
        if _is_attention(part):
            inside.append(name)
            yield BlockRef(name, part, CROSS if _is_cross(name, part) else ATTENTION)
        elif _is_mlp(name, part):
            inside.append(name)
            yield BlockRef(name, part, MLP)
        elif _is_block(name, module, part):
            yield BlockRef(name, part, BLOCK, _hidden(part))


def _is_stage(name: str) -> bool:
    parts = name.split(".")
    if len(parts) == 1:
        return parts[0] == "mid_block"
    return len(parts) == 2 and parts[0] in ("down_blocks", "up_blocks")


def _is_attention(part: nn.Module) -> bool:
    children = dict(part.named_children())
    projects = {"to_q", "q_proj", "query", "q", "to_qkv", "qkv"} & children.keys()
    return bool(projects) and "attn" not in children


def _is_cross(name: str, part: nn.Module) -> bool:
    # diffusers' Attention knows its key width; elsewhere the second attention of a block is the cross one.
    query, key = (getattr(part, n, None) for n in ("query_dim", "cross_attention_dim"))
    declared = getattr(part, "is_cross_attention", None)
    if declared is not None:
        return bool(declared) or name.rsplit(".", 1)[-1] == "attn2"
    return name.rsplit(".", 1)[-1] in ("attn2", "cross_attn") or (key is not None and key != query)


def _is_mlp(name: str, part: nn.Module) -> bool:
    if isinstance(part, nn.Linear | nn.ModuleList):
        return False
    last = name.rsplit(".", 1)[-1]
    linears = sum(isinstance(m, nn.Linear) for m in part.modules())
    return last in ("ff", "mlp", "ffn", "feed_forward", "ff_context") and linears >= 2


def _is_block(name: str, root: nn.Module, part: nn.Module) -> bool:
    parent = root.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.ModuleList):
        return False
    if "hidden_states" not in inspect.signature(part.forward).parameters:
        return False
    # A U-Net's stages also stand in a list, but they are whole sub-networks.
    return any(_is_attention(m) for m in part.children())


def _hidden(part: nn.Module) -> tuple[str, ...]:
    """MMDiT blocks carry text and picture and return both; the others carry one hidden state."""
    arguments = inspect.signature(part.forward).parameters
    joint = hasattr(part, "norm1_context") or "single" in type(part).__name__.lower()
    if joint and "encoder_hidden_states" in arguments:
        return ("encoder_hidden_states", "hidden_states")
    return ("hidden_states",)
