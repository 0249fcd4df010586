"""First-block cache: run the first block, and skip the others for the samples for which it changed little."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call, active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.cache._chain import (
    OTHERWISE,
    argument,
    argument_names,
    chain_of,
    difference,
    padded,
    put,
    row_means,
    states_of,
    take,
)
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import BlockRef, Network
    from suite.plugins.cache._chain import States
    from suite.run import Run

UNIT = "block evaluations skipped (rows x blocks)"
NAME = "first-block"


@dataclass
class _Kept:
    """Of one branch and evaluation; the first axis of each tensor is the batch.

    Attributes:
        change: the first block's residual when the row was last computed.
        rest: the other blocks' residual then, the last one's output minus the first one's.
        steps: when that was.
    """

    change: Tensor
    rest: States
    steps: list[int]


@dataclass
class _Pass:
    """The evaluation that is under way: what the first block gave, and which rows the others must compute.

    Attributes:
        kept: what the other rows reuse; None if all rows are missing.
        rows: the missing rows as an index.
    """

    call: Call
    first: States
    change: Tensor
    missing: list[int]
    kept: _Kept | None = None
    rows: Tensor | None = None


@dataclass
class _Chain:
    """The blocks of a network as one chain, and what is kept of it during one run."""

    refs: Sequence[BlockRef]
    options: FirstBlock
    kept: dict[tuple[str, int], _Kept] = field(default_factory=dict)
    now: _Pass | None = None
    rows: int = 0
    skipped: int = 0
    hits: dict[int, int] = field(default_factory=dict)
    nearest: float = math.inf
    estimates: list[float] = field(default_factory=list)
    peak: int = 0

    def first(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The first block: always runs, then decides for each row."""
        ref = self.refs[0]
        arguments = argument_names(ref.module)
        main = ref.hidden.index("hidden_states") if "hidden_states" in ref.hidden else 0

        def run(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            before = argument(ref.hidden[main], arguments, args, kwargs)
            output = forward(*args, **kwargs)
            states: States = states_of(NAME, ref, output)
            change = states[main] - before
            # Taken out, so that a full evaluation does not hold the old residuals and the new ones at once.
            kept = self.kept.pop((call.branch, call.evaluation), None)
            missing = self._missing(call, kept, change)
            hits = change.shape[0] - len(missing)
            self.now = _Pass(call, states, change, missing)
            if kept is not None and hits:
                self.kept[call.branch, call.evaluation] = kept
                self.now.kept, self.now.rows = kept, change.new_tensor(missing).long()
            self.rows += change.shape[0]
            self.skipped += hits * (len(self.refs) - 1)
            self.hits[call.step] = self.hits.get(call.step, 0) + hits
            return output

        return run

    def other(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Block `index` > 0: runs on the rows that are missing; the last one puts the others in."""
        ref, last = self.refs[index], index == len(self.refs) - 1
        arguments = argument_names(ref.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            now = self.now
            if now is None:
                raise ConfigError(
                    f"first-block: {ref.name} ran before {self.refs[0].name}, so the blocks are not one chain; "
                    f"{OTHERWISE}"
                )
            if now.kept is None:
                output = forward(*args, **kwargs)
                if last:
                    self._keep_all(now, states_of(NAME, ref, output))
                return output
            if last:
                states: States = self._reused(now)
            else:
                states = tuple(argument(name, arguments, args, kwargs) for name in ref.hidden)
            if now.missing:
                batch = now.change.shape[0]
                some = [
                    take(value, name, now.rows, batch)
                    for name, value in zip(padded(arguments, args), args, strict=True)
                ]
                others = {name: take(value, name, now.rows, batch) for name, value in kwargs.items()}
                computed = states_of(NAME, ref, forward(*some, **others))
                if last:
                    self._keep_some(now, computed)
                states = tuple(put(s, now.rows, c) for s, c in zip(states, computed, strict=True))
            if last:
                self.now = None
            return states[0] if len(states) == 1 else states

        return run

    def _missing(self, call: Call, kept: _Kept | None, change: Tensor) -> list[int]:
        """Rows that must be computed. One transfer from the device for the whole batch."""
        options, everything = self.options, list(range(change.shape[0]))
        if kept is None or kept.change.shape != change.shape:
            return everything
        if call.step < options.warmup or call.step >= call.steps - options.last:
            return everything
        distance = row_means(change - kept.change) / row_means(kept.change)
        relative: list[float] = distance.tolist()
        self.nearest = min(self.nearest, *(r for r in relative if r == r), math.inf)
        limit = options.max_consecutive or call.steps
        # A change that is not a number is never below the threshold.
        missing = [
            row
            for row in everything
            if not (relative[row] < options.threshold and call.step - kept.steps[row] <= limit)
        ]
        self.estimates.extend(relative[row] for row in everything if row not in missing)
        return missing

    def _reused(self, now: _Pass) -> States:
        assert now.kept is not None
        return tuple(None if r is None or f is None else f + r for f, r in zip(now.first, now.kept.rest, strict=True))

    def _keep_all(self, now: _Pass, states: States) -> None:
        rest = tuple(difference(NAME, self.refs, a, b) for a, b in zip(now.first, states, strict=True))
        key = (now.call.branch, now.call.evaluation)
        self.kept[key] = _Kept(now.change, rest, [now.call.step] * now.change.shape[0])
        self.peak = max(self.peak, self.held())
        self.now = None

    def held(self) -> int:
        return sum(size((k.change, k.rest)) for k in self.kept.values())

    def _keep_some(self, now: _Pass, computed: States) -> None:
        assert now.kept is not None and now.rows is not None
        now.kept.change[now.rows] = now.change[now.rows]
        for kept, first, new in zip(now.kept.rest, now.first, computed, strict=True):
            if kept is not None and first is not None and new is not None:
                kept[now.rows] = new - first[now.rows]
        for row in now.missing:
            now.kept.steps[row] = now.call.step

    def report(self) -> WrapReport:
        hits = sum(self.hits.values())
        facts = reuse(
            hits=hits,
            misses=self.rows - hits,
            skipped_share=self.skipped / max(1, self.rows * len(self.refs)),
            bytes_held=self.peak,
            # How far the first block was from what the others were computed for.
            error_estimate=sum(self.estimates) / len(self.estimates) if self.estimates else None,
            hit_share=hits / max(1, self.rows),
            hits_by_step=[self.hits[step] for step in sorted(self.hits)],
        )
        reason = "" if hits else self._why_nothing()
        return WrapReport(self.skipped, UNIT, facts, reason)

    def _why_nothing(self) -> str:
        if self.nearest == math.inf:
            return f"no step came after warmup = {self.options.warmup} and before last = {self.options.last}"
        return f"the smallest relative change was {self.nearest:.3g}, threshold = {self.options.threshold:g}; raise it"


@dataclass(frozen=True)
class FirstBlock(Plugin):
    """Skip the blocks after the first for samples whose first residual is like the one last computed.

    With r the first block's output minus its input, a row of the batch is reused if
    mean|r - r'| / mean|r'| < threshold, r' being the r of the step at which the row was last computed; then
    the last block's output is the first one's plus the residual of the others at that step. Each row decides
    for itself: guidance branches in one batch stay apart, and a sample does not depend on its neighbours.
    Blocks with two streams compare the picture's and reuse both.

    Args:
        threshold: largest relative change; 0 computes everything. 0.05 to 0.15 is usual.
        warmup: first steps that are always computed.
        last: final steps that are always computed.
        max_consecutive: most steps in a row in which a sample is reused; None is no limit.

    Raises:
        ConfigError: from the hook, if the network has no chain of at least two blocks.
    """

    threshold: float = 0.08
    warmup: int = 1
    last: int = 0
    max_consecutive: int | None = None

    summary = "skip all blocks but the first while its residual changes little; each sample decides for itself"
    paper = "First Block Cache (ParaAttention), after TeaCache (2411.19108)"
    effects = frozenset({"block-outputs", "step-reuse", "dynamic-decision"})
    bench_options = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2})
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0}
    acting_options: ClassVar[dict[str, Any]] = {"threshold": 0.3}

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ConfigError(
                f"first-block: threshold = {self.threshold}: expected 0 or more, e.g. first-block:threshold=0.08"
            )
        for name in ("warmup", "last"):
            if getattr(self, name) < 0:
                raise ConfigError(f"first-block: {name} = {getattr(self, name)}: expected 0 or more steps")
        if self.max_consecutive is not None and self.max_consecutive < 1:
            raise ConfigError(f"first-block: max_consecutive = {self.max_consecutive}: expected at least 1, or none")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.patch import Patches

        chain, patches = _Chain(chain_of(network, NAME), self), Patches()
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.08"))

        def install(module: nn.Module) -> nn.Module:
            for index, ref in enumerate(chain.refs):
                patches.replace(ref.module, lambda f, index=index: chain.other(index, f) if index else chain.first(f))
            return module

        def undo() -> None:
            patches.undo()
            chain.kept.clear()
            chain.now = None

        return Wrap(report=chain.report, network=install, undo=undo, held=chain.held)
