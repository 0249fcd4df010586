"""Keys and values of tokens that have not changed: what `prefix-kv` and `dual-kv` have in common.

An evaluation is *whole*, and then every attention's keys and values are kept, or it is of a *part*: then the network
gets the tokens of one block alone, and its attentions see the kept keys and values of all other places beside the
block's fresh ones. A row of the batch decides for itself, from its own tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from suite.diffusion.denoiser import chosen
from suite.errors import ConfigError
from suite.network.described import found
from suite.plugins.cache._shared import size
from suite.wrap import WrapReport, reuse

if TYPE_CHECKING:
    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.network import BlockRef, Network

UNIT = "places not computed (rows x places)"
Make = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class _Kept:
    """Of one branch, B rows; what belongs to a row is of its last whole evaluation.

    Attributes:
        x: tokens [B, L] then.
        probabilities: the last answer [B, L, V], parts put in.
        masked: the mask's token, -1 while none was seen.
        ages: evaluations of each row since.
        states: keys and values [B, heads, N, d] of each attention, N >= L places with the conditioning's first.
        masks: what each attention was told to leave out, None or [1 or B, ...].
    """

    x: Tensor
    probabilities: Tensor
    masked: int
    ages: list[int]
    states: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """N, the conditioning's places included."""
        return max((keys.shape[2] for keys, _ in self.states.values()), default=self.x.shape[1])


@dataclass(frozen=True)
class _Pass:
    """The network call that is under way: which rows of the branch, and which places of x (None: all)."""

    kept: _Kept
    rows: Tensor
    places: Tensor | None
    length: int


@dataclass
class TokenKV:
    """The state of one run, and its denoiser.

    Attributes:
        name: of the plugin, for messages.
        block: places of a block.
        suffix: keep also what lies behind the block; otherwise everything from the block on is computed.
        refresh: evaluate a row whole at every so many evaluations; 0 only when another place has changed.
    """

    name: str
    block: int
    suffix: bool
    refresh: int
    limit: float
    kept: dict[str, _Kept] = field(default_factory=dict)
    now: _Pass | None = None
    whole: int = 0
    parts: int = 0
    known: int = 0
    computed: int = 0
    saved: int = 0
    peak: int = 0

    # ---- above the network: what to ask for --------------------------------------------------------

    def denoise(self, inner: Denoiser, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        """p(x0 given x) of all places, of which only those that are needed are computed."""
        kept = self.kept.get(call.key)
        if kept is None or kept.x.shape != x.shape:
            everything = torch.arange(x.shape[0], device=x.device)
            return self._whole(inner, x, t, cond, call, everything, None)
        groups: dict[int | str, list[int]] = defaultdict(list)
        for row, start in enumerate(self._starts(kept, x)):
            groups[start].append(row)
        out = kept.probabilities.clone()
        for start, members in groups.items():
            rows = torch.tensor(members, device=x.device)
            if start == "known":
                out[rows] = torch.nn.functional.one_hot(x[rows], out.shape[-1]).to(out)
                self.known += len(members)
                self.saved += len(members) * kept.places
            elif isinstance(start, str):
                out[rows] = self._whole(inner, x, t, cond, call, rows, kept)[rows]
            else:
                places = self._places(start, x)
                out[rows[:, None], places] = self._part(inner, x, t, cond, call, rows, places, kept)
        kept.probabilities = out
        return out

    def _starts(self, kept: _Kept, x: Tensor) -> list[int | str]:
        """For each row the first place of the part, or "whole", or "known" if no place is masked."""
        length = x.shape[1]
        masked = x == kept.masked
        place = torch.arange(length, device=x.device)
        first = masked.long().argmax(-1) // self.block * self.block
        last = first + self.block
        if self.suffix:  # the last block may be shorter than the others: the part has one size
            first = first.clamp(max=max(0, length - self.block))
        inside = (place >= first[:, None]) & ((place < last[:, None]) | (not self.suffix))
        stale = ((x != kept.x) & ~inside).any(-1)
        out: list[int | str] = []
        numbers = zip(first.tolist(), stale.tolist(), masked.any(-1).tolist(), kept.ages, strict=True)
        for start, old, open_, age in numbers:
            if not open_:
                out.append("known")
            elif old or (self.refresh and age + 1 >= self.refresh):
                out.append("whole")
            else:
                out.append(start)
        return out

    def _places(self, start: int, x: Tensor) -> Tensor:
        stop = min(start + self.block, x.shape[1]) if self.suffix else x.shape[1]
        return torch.arange(start, stop, device=x.device)

    def _whole(
        self, inner: Denoiser, x: Tensor, t: Tensor, cond: Cond, call: Call, rows: Tensor, kept: _Kept | None
    ) -> Tensor:
        """Answers [B, L, V], fresh in these rows, whose keys and values are kept."""
        batch, length = x.shape
        if kept is None:
            kept = _Kept(x.clone(), x.new_empty(0), -1, [0] * batch)
        self.now = _Pass(kept, rows, None, length)
        try:
            if len(rows) == batch:
                answer = inner.denoise(x, t, cond, call)
                kept.probabilities = answer
            else:
                some = t if t.ndim == 0 else t[rows]
                part = replace(call, share=call.share * len(rows) / batch)
                answer = inner.denoise(x[rows], some, chosen(cond, rows), part)
                kept.probabilities = kept.probabilities.index_copy(0, rows, answer)
        finally:
            self.now = None
        kept.x[rows] = x[rows]
        for row in rows.tolist():
            kept.ages[row] = 0
        if kept.masked < 0:
            # A denoiser gives a known token all the chance, and the mask none.
            masked = kept.probabilities.gather(-1, x[..., None])[..., 0] < 0.5
            kept.masked = int(torch.where(masked, x, -1).max())
        self.kept[call.key] = kept
        self.whole += len(rows)
        self.computed += len(rows) * kept.places
        self._account()
        return kept.probabilities

    def _part(
        self,
        inner: Denoiser,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        call: Call,
        rows: Tensor,
        places: Tensor,
        kept: _Kept,
    ) -> Tensor:
        """Answers [R, A, V] for these places of these rows."""
        self.now = _Pass(kept, rows, places, x.shape[1])
        positions = places.expand(len(rows), -1)
        some = {**chosen(cond, rows), "positions": positions}
        try:
            answer = inner.denoise(
                x[rows[:, None], places],
                t if t.ndim == 0 else t[rows],
                some,
                replace(call, share=call.share * len(rows) / x.shape[0]),
            )
        finally:
            self.now = None
        for row in rows.tolist():
            kept.ages[row] += 1
        self.parts += len(rows)
        self.computed += positions.numel()
        self.saved += len(rows) * (kept.places - len(places))
        return answer

    def held(self) -> int:
        """Bytes of tokens, answers, keys and values."""
        return sum(
            size((k.x, k.probabilities)) + sum(size(pair) for pair in k.states.values()) for k in self.kept.values()
        )

    def _account(self) -> None:
        held = self.held()
        self.peak = max(self.peak, held)
        if held > self.limit * 2**20:
            raise ConfigError(
                f"{self.name} holds {held / 2**20:.3g} MiB of keys, values and answers, and limit_mib = "
                f"{self.limit:g}; raise it, make smaller batches, or drop --cache {self.name}"
            )

    # ---- inside the network: whose keys attention sees ---------------------------------------------

    def attention(self, name: str) -> Make:
        """For `Patches.replace`: the attention `name` with keys and values that are kept, or kept from now on."""

        def make(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if self.now is None:
                    return forward(*args, **kwargs)
                mode = _Attention(self, name, self.now)
                with mode:
                    out = forward(*args, **kwargs)
                if mode.seen != 1:
                    raise ConfigError(
                        f"{self.name}: attention {name} called scaled_dot_product_attention {mode.seen} times, "
                        "expected once; load the network with attn_implementation='sdpa'"
                    )
                return out

            return run

        return make

    def report(self) -> WrapReport:
        facts = reuse(
            hits=self.parts + self.known,
            misses=self.whole,
            skipped_share=self.saved / max(1, self.computed + self.saved),
            bytes_held=self.peak,
            parts=self.parts,
            known=self.known,
        )
        if self.saved:
            return WrapReport(self.saved, UNIT, facts)
        why = f"refresh = {self.refresh} evaluates everything at every step" if self.refresh == 1 else (
            f"between two evaluations of a row some place outside of its block of {self.block} had changed always"
        )  # fmt: skip
        return WrapReport(0, UNIT, facts, why)


class _Attention(TorchFunctionMode):
    """Inside one attention: its product sees kept keys and values where the part has none."""

    def __init__(self, state: TokenKV, name: str, now: _Pass) -> None:
        super().__init__()
        self.state, self.name, self.now, self.seen = state, name, now, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.seen += 1
        query, key, value, *more = args
        mask = kwargs.pop("attn_mask", more.pop(0) if more else None)
        if self.now.places is None:
            self._keep(key, value, mask)
        else:
            key, value, mask = self._complete(key, value)
        return func(query, key, value, mask, *more, **kwargs)

    def _keep(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        kept, rows = self.now.kept, self.now.rows
        if key.shape[2] < self.now.length:
            raise ConfigError(
                f"{self.state.name}: attention {self.name} has {key.shape[2]} keys for {self.now.length} tokens, so "
                f"they are not one sequence; drop --cache {self.state.name}"
            )
        if len(rows) == kept.x.shape[0]:
            kept.states[self.name], kept.masks[self.name] = (key, value), mask
            return
        before = kept.states[self.name]
        kept.states[self.name] = (before[0].index_copy(0, rows, key), before[1].index_copy(0, rows, value))
        if mask is not None and mask.shape[0] == len(rows) and kept.masks[self.name] is not None:
            old = kept.masks[self.name]
            assert old is not None
            kept.masks[self.name] = old.index_copy(0, rows, mask) if old.shape[0] == kept.x.shape[0] else old

    def _complete(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kept keys and values [R, heads, N, d] with the part's own at its places, and the mask over all."""
        kept, rows, places = self.now.kept, self.now.rows, self.now.places
        assert places is not None
        keys, values = (state[rows] for state in kept.states[self.name])  # a copy: what is kept stays
        offset = keys.shape[2] - self.now.length
        keys[:, :, offset + places], values[:, :, offset + places] = key, value
        mask = kept.masks[self.name]
        if mask is not None:
            mask = mask[rows] if mask.shape[0] == kept.x.shape[0] else mask
            mask = mask[:, :, offset + places] if mask.shape[2] > 1 else mask
        return keys, values, mask


@dataclass(frozen=True)
class KeptTokens:
    """A Denoiser in front of another one."""

    inner: Denoiser
    state: TokenKV

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        return self.state.denoise(self.inner, x, t, cond, call)


def attentions(name: str, network: Network) -> Sequence[BlockRef]:
    """The attentions of a network that can be asked for a part of its tokens.

    Raises:
        ConfigError: it has none, or cannot be asked so.
    """
    parts = network.blocks("attention")
    if not parts:
        raise ConfigError(f"{name} looked for attention, but {found(network)}; drop --cache {name}")
    if network.layout is None or not network.layout.parts:
        raise ConfigError(
            f"{name} asks the network for some of its tokens, which the modality must declare (Layout.parts), but for "
            f"{type(network.module).__name__} it does not; drop --cache {name}"
        )
    return parts
