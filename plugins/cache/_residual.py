"""The residual of a chain of blocks, last output minus first input, reused for the rows that a policy lets go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from suite.call import Call, active_call, active_rows
from suite.errors import ConfigError
from suite.network.chain import (
    OTHERWISE,
    argument,
    argument_names,
    by_sample,
    chain_of,
    closed,
    difference,
    padded,
    put,
    states_of,
    take,
)
from suite.wrap import reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import BlockRef, Network
    from suite.network.chain import States
    from suite.network.patch import Patches

UNIT = "block evaluations skipped (rows x blocks)"


class Policy(Protocol):
    """What decides, keeps and gives back. Rows are indices into the batch that the network was given.

    Signal and residual have one row for each of these; where blocks have several rows a sample (one a frame, or one a
    place), these are their second axis.

    Attributes:
        watches: it decides from the signal, the modulated input of the first attention.
    """

    watches: bool

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        """The rows that must be computed; the signal [B, ..., tokens, d] is there for those who watch."""
        ...

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        """The residual of these rows was computed."""
        ...

    def recall(self, call: Call) -> States:
        """What the rows that are not missing reuse, for the whole batch; the missing rows are not looked at."""
        ...


class _Reused(BaseException):
    """Ends the first block at its attention, because not all rows need it. Not an error: nothing should catch it."""


@dataclass
class _Pass:
    """The evaluation that is under way; `rows` is None if all rows are computed."""

    call: Call
    before: States
    batch: int
    missing: list[int]
    rows: Tensor | None

    def of(self, state: Tensor) -> Tensor:
        """The rows of a block's state that belong to the missing rows of the batch."""
        assert self.rows is not None
        each = state.shape[0] // self.batch
        return self.rows if each == 1 else (self.rows[:, None] * each + self.rows.new_tensor(range(each))).flatten()


@dataclass
class Residual:
    """A chain under a policy, for one run.

    Attributes:
        who: the plugin, for its messages.
        refs: the blocks in order.
        policy: see `Policy`.
        others: blocks of the network that are not in the chain, for the share.
        rows, skipped, hits: row evaluations, those times blocks that were skipped, and rows reused by step.
    """

    who: str
    refs: Sequence[BlockRef]
    policy: Policy
    others: int = 0
    attention: nn.Module | None = None
    now: _Pass | None = None
    #: While the first block is on its way to its attention: the states that it was given.
    entered: States | None = None
    rows: int = 0
    skipped: int = 0
    hits: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def of(network: Network, who: str, policy: Policy) -> Residual:
        """The network's chain, as far as it is `closed`, under this policy.

        Raises:
            ConfigError: see `chain_of`; or the first block has no attention.
        """
        blocks = chain_of(network, who)
        refs = closed(blocks)
        inside = [r for r in network.blocks("attention", "cross_attention") if r.name.startswith(f"{refs[0].name}.")]
        return Residual(who, refs, policy, len(blocks) - len(refs), inside[0].module if inside else None)

    def install(self, patches: Patches) -> None:
        """Replace the blocks' forwards, and the first attention's, which the signal is caught at."""
        for index, ref in enumerate(self.refs):
            patches.replace(ref.module, lambda forward, index=index: self._block(index, forward))
        if self.attention is not None:
            patches.replace(self.attention, self._catching)

    def _catching(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*args: Any, **kwargs: Any) -> Any:
            if self.entered is not None:
                states, self.entered = self.entered, None
                if self._begin(states, next(iter([*args, *kwargs.values()]))).rows is not None:
                    raise _Reused
            return forward(*args, **kwargs)

        return attend

    def _watched(self, states: States, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The first block, which its attention's input decides about; None if it ended there.

        What stands before the attention, a norm, scale and shift by the time, is not computed twice where all rows are.
        """
        self.entered = states
        try:
            output = forward(*args, **kwargs)
        except _Reused:
            return None
        finally:
            unseen, self.entered = self.entered, None
        if unseen is not None:
            raise ConfigError(
                f"{self.who}: {self.refs[0].name} ran without an attention, so there is no signal; {OTHERWISE}"
            )
        return output

    def _block(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Block `index`: the first asks the policy, all run on the missing rows, the last puts the others in."""
        ref, last = self.refs[index], index == len(self.refs) - 1
        names = argument_names(ref.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                states = self._states(ref, names, args, kwargs)
                if not self.policy.watches:
                    self._begin(states, None)
                elif (output := self._watched(states, forward, args, kwargs)) is not None:
                    return output
            now = self.now
            if now is None:
                first = self.refs[0].name
                raise ConfigError(
                    f"{self.who}: {ref.name} ran before {first}, so the blocks are not one chain; {OTHERWISE}"
                )
            if now.rows is None:
                output = forward(*args, **kwargs)
                if last:
                    self._end(now, states_of(self.who, ref, output), now.before)
                return output
            states = self._states(ref, names, args, kwargs)
            if last:
                reused = self.policy.recall(now.call)
                states = tuple(
                    None if r is None or b is None else b + r.reshape(b.shape)
                    for b, r in zip(now.before, reused, strict=True)
                )
            if now.missing:
                like = next(s for s in states if s is not None)
                batch, rows = like.shape[0], now.of(like)
                some = [take(v, n, rows, batch) for n, v in zip(padded(names, args), args, strict=True)]
                others = {n: take(v, n, rows, batch) for n, v in kwargs.items()}
                computed = states_of(self.who, ref, forward(*some, **others))
                if last:
                    before = tuple(None if b is None else b[rows] for b in now.before)
                    self._end(now, computed, before)
                states = tuple(put(s, rows, c) for s, c in zip(states, computed, strict=True))
            if last:
                self.now = None
            return states[0] if len(states) == 1 else states

        return run

    @staticmethod
    def _states(ref: BlockRef, names: Sequence[str], args: Any, kwargs: Any) -> States:
        return tuple(argument(name, names, args, kwargs) for name in ref.hidden)

    def _begin(self, states: States, signal: Tensor | None) -> _Pass:
        call = active_call()
        like = next(s for s in states if s is not None)
        batch = active_rows() or like.shape[0]
        missing = self.policy.missing(call, batch, by_sample(signal, batch))
        hits = batch - len(missing)
        self.now = _Pass(call, states, batch, missing, like.new_tensor(missing).long() if hits else None)
        self.rows += batch
        self.skipped += hits * len(self.refs)
        self.hits[call.step] = self.hits.get(call.step, 0) + hits
        return self.now

    def _end(self, now: _Pass, computed: States, before: States) -> None:
        whole = (difference(self.who, self.refs, a, b) for a, b in zip(before, computed, strict=True))
        self.policy.keep(now.call, now.missing, tuple(by_sample(r, len(now.missing)) for r in whole))
        self.now = None

    def facts(self, **of_policy: Any) -> dict[str, Any]:
        """For the report: rows reused, also by step, and the share of blocks skipped, with what the policy adds."""
        hits = sum(self.hits.values())
        return reuse(
            hits=hits,
            misses=self.rows - hits,
            skipped_share=self.skipped / max(1, self.rows * (len(self.refs) + self.others)),
            hit_share=hits / max(1, self.rows),
            hits_by_step=[self.hits[step] for step in sorted(self.hits)],
            **of_policy,
        )
