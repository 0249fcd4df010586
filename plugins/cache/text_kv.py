"""Keys and values of the text, computed once: what cross-attention makes of a prompt is the same at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from suite.call import active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import Network
    from suite.run import Run

UNIT = "text projections reused"
#: What cross-attention applies to the text, as the libraries name it.
PROJECTIONS = (
    "to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj", "k_proj", "v_proj", "key", "value", "norm_cross",
)  # fmt: skip
#: Parts outside of the attentions that see the text alone.
EMBEDDERS = (
    "caption_projection", "caption_norm", "text_embedder", "text_proj", "text_embedding", "encoder_hid_proj",
    "cross_attention_proj", "image_embedder",
)  # fmt: skip
#: Texts that are kept for a branch: views of a scene may be told in words, and come back.
TEXTS = 4
MIB = 2**20


@dataclass
class _Texts:
    """What was made of the last texts, by part and branch, and how often that was used."""

    limit: float
    kept: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    computed: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    peak: int = 0

    def once(self, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of `part`, run once for each text."""

        def answer(text: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:  # more than a projection of the text
                return forward(text, *args, **kwargs)
            # By the branch alone: the text itself is compared, whoever it travels with.
            texts = self.kept.setdefault((part, active_call().branch), [])
            for before, output in texts:
                if equal(text, before):
                    self.reused += 1
                    return output
            self.computed[part] += 1
            output = forward(text)
            texts.append((text, output))
            del texts[:-TEXTS]
            self.peak = max(self.peak, held := self.held())
            if held > self.limit * MIB:
                raise ConfigError(
                    f"text-kv holds {held / MIB:.3g} MiB at {part}, and limit_mib = {self.limit:g}; raise it, make "
                    "smaller batches, or drop --cache text-kv"
                )
            return output

        return answer

    def held(self) -> int:
        """Bytes of texts and of what was made of them; a text that several parts see counts once."""
        tensors = [t for texts in self.kept.values() for pair in texts for t in pair]
        return sum(size(t) for t in {t.data_ptr(): t for t in tensors}.values())

    def report(self) -> WrapReport:
        computed = sum(self.computed.values())
        facts = reuse(
            hits=self.reused,
            misses=computed,
            skipped_share=self.reused / max(1, self.reused + computed),
            bytes_held=self.peak,
            parts=len(self.computed),
        )
        most = max(self.computed.values(), default=0)
        why = "each branch was evaluated once" if most <= 2 else "the text was another one at every evaluation"
        return WrapReport(self.reused, UNIT, facts, "" if self.reused else why)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; without looking at them where they are the same memory.

    `b` is still held by its owner, so memory at its place can be of no other tensor.
    """
    import torch

    if a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(a, b)


def text_parts(network: Network) -> list[tuple[str, nn.Module]]:
    """The parts that see nothing but the text, by dotted path.

    Raises:
        ConfigError: no cross-attention, because there is no text or because it changes from block to block.
    """
    crosses = network.blocks("cross_attention")
    parts: dict[str, nn.Module] = {}
    for ref in crosses:
        for name, child in ref.module.named_children():
            if name in PROJECTIONS:
                parts[f"{ref.name}.{name}"] = child
    if not parts:
        raise ConfigError(f"text-kv {_why_not(network)}; drop --cache text-kv")
    inside = tuple(ref.name + "." for ref in network.blocks("block", "attention", "cross_attention", "mlp"))
    for name, part in network.module.named_modules():
        if name.rpartition(".")[2] in EMBEDDERS and not name.startswith(inside):
            parts[name] = part
    return list(parts.items())


def _why_not(network: Network) -> str:
    streams = {name for ref in network.blocks("block") for name in ref.hidden}
    looked = f"looked for cross-attention with {', '.join(PROJECTIONS[:2])}, but {found(network)}"
    if "encoder_hidden_states" in streams:
        return f"{looked}: its attention is joint, and every block changes the text, so keys are new at every step"
    return f"{looked}: where text and sample share one sequence, or there is no text, nothing of it stays the same"


@dataclass(frozen=True)
class TextKV(Plugin):
    """Exact reuse: K = W_k c and V = W_v c do not depend on x nor on the time, so T steps need them once.

    In every cross-attention the projections of the text, and the projections before them that see the text alone,
    are computed for the first evaluation of a branch and reused as long as the text is equal. That is compared, not
    assumed: another prompt, another batch or a text that depends on the time is computed anew, so the result is the
    plain one bit for bit, whatever layers other plugins have put there. Branches that travel as one batch have
    entries of their own, since a product of another size rounds differently.

    Args:
        limit_mib: most memory that may be held.

    Raises:
        ConfigError: from the hook, if the network has no cross-attention; in the run, if more would be held.
    """

    limit_mib: float = 1024.0

    summary = "compute keys and values of the text once a run; bit-identical"
    paper = "exact key/value cache of cross-attention; diffusers' TextKVCache for one model, here by structure"
    lossless = True
    effects = frozenset({"exact-reuse"})

    def __post_init__(self) -> None:
        if not self.limit_mib > 0:
            raise ConfigError(
                f"text-kv: limit_mib = {self.limit_mib}: expected MiB above 0, e.g. text-kv:limit_mib=512"
            )

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        parts: Sequence[tuple[str, nn.Module]] = text_parts(network)
        texts, patches = _Texts(self.limit_mib), Patches()

        def install(module: nn.Module) -> nn.Module:
            seen: set[int] = set()
            for name, part in parts:
                if id(part) not in seen:  # layers may be shared
                    seen.add(id(part))
                    patches.replace(part, lambda forward, name=name: texts.once(name, forward))
            return module

        def undo() -> None:
            patches.undo()
            texts.kept.clear()

        return Wrap(report=texts.report, network=install, undo=undo, held=texts.held)
