"""First-block cache: run the first block, and skip the others for the samples for which it changed little."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call, active_rows
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.chain import (
    OTHERWISE,
    argument,
    argument_names,
    by_sample,
    chain_of,
    closed,
    row_means,
    states_of,
)
from suite.plugin import Plugin
from suite.plugins.cache._residual import UNIT, Residual
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import BlockRef, Network
    from suite.network.chain import States
    from suite.run import Run

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
class _Policy:
    """Decides from what the first block has just added; see `suite.plugins.cache._residual.Policy`."""

    options: FirstBlock
    chain: Sequence[BlockRef]
    kept: dict[tuple[str, int], _Kept] = field(default_factory=dict)
    change: Tensor | None = None
    nearest: float = math.inf
    estimates: list[float] = field(default_factory=list)
    peak: int = 0
    watches: bool = False

    def first(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the first block, which always runs."""
        ref = self.chain[0]
        arguments = argument_names(ref.module)
        main = ref.hidden.index("hidden_states") if "hidden_states" in ref.hidden else 0

        def run(*args: Any, **kwargs: Any) -> Any:
            before = argument(ref.hidden[main], arguments, args, kwargs)
            output = forward(*args, **kwargs)
            change = states_of(NAME, ref, output)[main] - before
            self.change = by_sample(change, active_rows() or change.shape[0])
            return output

        return run

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        """One transfer from the device for the whole batch."""
        del signal
        if self.change is None:
            raise ConfigError(
                f"{NAME}: {self.chain[1].name} ran before {self.chain[0].name}, so the blocks are not one chain; "
                f"{OTHERWISE}"
            )
        options, everything, key = self.options, list(range(batch)), (call.key, call.evaluation)
        # Taken out, so that a full evaluation does not hold the old residuals and the new ones at once.
        kept = self.kept.pop(key, None)
        if kept is None or kept.change.shape != self.change.shape:
            return everything
        if call.step < options.warmup or call.step >= call.steps - options.last:
            return everything
        distance = row_means(self.change - kept.change) / row_means(kept.change)
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
        if len(missing) < batch:
            self.kept[key] = kept
        return missing

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        assert self.change is not None
        kept = self.kept.get((call.key, call.evaluation))
        if kept is None:
            self.kept[call.key, call.evaluation] = _Kept(self.change, residual, [call.step] * len(rows))
            self.peak = max(self.peak, self.held())
            return
        kept.change[rows] = self.change[rows]
        for old, new in zip(kept.rest, residual, strict=True):
            if old is not None and new is not None:
                old[rows] = new
        for row in rows:
            kept.steps[row] = call.step

    def recall(self, call: Call) -> States:
        return self.kept[call.key, call.evaluation].rest

    def held(self) -> int:
        return sum(size((k.change, k.rest)) for k in self.kept.values())

    def facts(self) -> dict[str, Any]:
        # How far the first block was from what the others were computed for.
        mean = sum(self.estimates) / len(self.estimates) if self.estimates else None
        return {"error_estimate": mean, "bytes_held": self.peak}

    def why_nothing(self) -> str:
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
        from suite.network.patch import Patches

        blocks = chain_of(network, NAME)
        policy, patches, rest = _Policy(self, blocks), Patches(), closed(blocks[1:])
        chain = Residual(NAME, rest, policy, len(blocks) - len(rest))
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.08"))

        def install(module: nn.Module) -> nn.Module:
            patches.replace(blocks[0].module, policy.first)
            chain.install(patches)
            return module

        def report() -> WrapReport:
            reason = "" if chain.skipped else policy.why_nothing()
            return WrapReport(chain.skipped, UNIT, chain.facts(**policy.facts()), reason)

        def undo() -> None:
            patches.undo()
            policy.kept.clear()
            policy.change = chain.now = None

        return Wrap(report=report, network=install, undo=undo, held=policy.held)
