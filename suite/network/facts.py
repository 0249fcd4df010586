"""`Network`: a module and the facts that plugins need, found by structure rather than by class name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn

BLOCK, ATTENTION, CROSS, TEMPORAL, MLP, DOWN, MID, UP = (
    "block",
    "attention",
    "cross_attention",
    "temporal_attention",
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
        kind: block, attention, cross_attention, temporal_attention, mlp, down, mid or up.
        hidden: names of the arguments that carry the hidden state, in the order in which the forward
            returns them; empty for parts that are not blocks.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    kind: str
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Latent of one sample: [channels, (frames,) height, width] or [channels, length]; tokens per sample.

    `parts` says that the modality's forward can be asked for some places of tokens only: `positions` [B, A] in the
    conditioning name them, x is [B, A], and nothing else enters the sequence. A whole evaluation has the tokens of
    the conditioning, as many at every call, in front of those of x. Attention then sees these places alone, unless
    a plugin brings the keys and values of the others.
    """

    shape: tuple[int, ...]
    tokens: int = 0
    parts: bool = False


@dataclass(frozen=True)
class Network:
    """A module with facts.

    Attributes:
        module: the network.
        layout: latent layout, if the modality told it.
        guidance_distilled: guidance is already inside; CFG must not be added.
        timeless: the output does not depend on the time, but on x and the conditioning alone.
        declared: block references that a modality gives itself; empty means automatic.
    """

    module: nn.Module
    layout: Layout | None = None
    guidance_distilled: bool = False
    timeless: bool = False
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

    A `block` is a member of a ModuleList that holds an attention and returns some of its arguments; `down`,
    `mid` and `up` are the U-Net's stages; `attention`, `cross_attention` and `temporal_attention` are the outermost
    modules of that kind wherever they stand, and `mlp` those in a ModuleList. Members of a list and of an equally long
    one beside it called `temporal_...` (Latte's) come in turns; other modules that run in turns although they are kept
    in lists of their own (a video U-Net's spatial and temporal ones) come list by list.

    `temporal_attention` goes from frame to frame at one place: networks that have it keep it in lists of its own.
    Where one attention goes over space and time at once (Wan, CogVideoX) it is `attention`.

    Only classes and the tree are looked at, never an instance's `forward`: a wrap may have replaced it.
    """
    inside: list[str] = []
    for name, part in _in_order(module):
        if _is_stage(name):
            yield BlockRef(name, part, name.split(".")[0].removesuffix("_blocks").removesuffix("_block"))
        if any(name.startswith(prefix + ".") for prefix in inside):
            continue
        if _is_attention(part):
            inside.append(name)
            kind = CROSS if _is_cross(name, part) else TEMPORAL if _is_temporal(name) else ATTENTION
            yield BlockRef(name, part, kind)
        elif _is_mlp(name, part):
            inside.append(name)
            yield BlockRef(name, part, MLP)
        elif _is_block(name, module, part):
            yield BlockRef(name, part, BLOCK, carried(type(part)))


def _in_order(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All parts in order of registration, but a U-Net's middle before its way up: it is registered last."""
    late = {"mid_block": 1, "up_blocks": 2}
    parts = [(name, part) for name, part in module.named_modules() if name]
    at = {name: number for number, (name, _) in enumerate(parts)}
    lists = {name: len(part) for name, part in parts if isinstance(part, nn.ModuleList)}
    twins = {name: twin for name in lists if (twin := _twin(name, lists))}

    def turn(name: str) -> tuple[int, int, int, int]:
        """Late or not; the place of its list, or its own; which member it is in; its place."""
        path = name.split(".")
        last = late.get(path[0], 0)
        for depth in range(1, len(path)):
            if (spatial := twins.get(".".join(path[:depth]))) is not None:
                return last, at[spatial], int(path[depth]), at[name]
        return last, at[name], -1, at[name]

    return sorted(parts, key=lambda item: turn(item[0]))


def _twin(name: str, lists: Mapping[str, int]) -> str:
    """Of two equally long lists X and temporal_X side by side the name of X; "" for any other list."""
    above, dot, last = name.rpartition(".")
    plain = last.removeprefix("temporal_")
    spatial, temporal = (above + dot + prefix + plain for prefix in ("", "temporal_"))
    return spatial if spatial in lists and lists[spatial] == lists.get(temporal) else ""


def _is_stage(name: str) -> bool:
    parts = name.split(".")
    if len(parts) == 1:
        return parts[0] == "mid_block"
    return len(parts) == 2 and parts[0] in ("down_blocks", "up_blocks")


def _is_attention(part: nn.Module) -> bool:
    children = dict(part.named_children())
    projects = {"to_q", "q_proj", "query", "q", "to_qkv", "qkv", "Wqkv"} & children.keys()
    return bool(projects) and "attn" not in children


def _is_cross(name: str, part: nn.Module) -> bool:
    # diffusers' classes say it, and then the name does not matter: SD3.5's `attn2` is a second self-attention.
    declared = getattr(part, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    query, key = (getattr(part, n, None) for n in ("query_dim", "cross_attention_dim"))
    return name.rsplit(".", 1)[-1] in ("attn2", "cross_attn") or (key is not None and key != query)


def _is_temporal(name: str) -> bool:
    # Of diffusers: Latte's and Stable Video's blocks, the temporal attention of 3-D U-Nets, AnimateDiff's modules.
    lists = ("temporal_transformer_blocks", "temp_attentions", "transformer_in", "motion_modules")
    return any(part in lists for part in name.split("."))


def _is_mlp(name: str, part: nn.Module) -> bool:
    if isinstance(part, nn.Linear | nn.ModuleList):
        return False
    *path, last = name.split(".")
    if last not in ("ff", "mlp", "ffn", "feed_forward", "ff_context") or not any(p.isdigit() for p in path):
        return False
    return sum(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in part.modules()) >= 2


def _is_block(name: str, root: nn.Module, part: nn.Module) -> bool:
    if not isinstance(root.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
        return False
    # A U-Net's stages also stand in a list, but they are whole sub-networks: no attention of their own.
    # BERT's attention is inside of a module that also adds its input and normalises, hence the second look.
    inner = [m for child in part.children() for m in (child, getattr(child, "self", None)) if m is not None]
    return any(_is_attention(m) for m in inner) and bool(carried(type(part)))


@cache
def carried(cls: type[nn.Module]) -> tuple[str, ...]:
    """The arguments that a block's forward returns, in the order in which it returns them.

    Read from the source of the forward, because nothing else tells: of the blocks that carry text and picture
    SD3's and Flux' return the text first, CogVideoX' and HunyuanVideo's the picture.
    """
    arguments = list(inspect.signature(cls.forward).parameters)[1:]
    found: tuple[str, ...] = ("hidden_states",) if "hidden_states" in arguments else ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):  # no source: built in, or typed at a prompt
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            names = tuple(v.id for v in values if isinstance(v, ast.Name))
            if len(names) == len(values) and set(names) <= set(arguments) and len(names) >= len(found):
                found = names
    return found
