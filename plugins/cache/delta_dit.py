"""Delta-DiT: keep what a range of blocks adds to its input; late blocks first, early blocks near the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import active_call, first_steps
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.chain import OTHERWISE, argument, argument_names, as_output, chain_of, closed, states_of
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._outputs import Outputs
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import BlockRef, Network
    from suite.run import Run

UNIT = "block calls skipped"
FRONT, REAR = "front", "rear"


@dataclass
class _Ranges:
    """The chain with its two ranges, what is kept of them in one run, and the evaluation that is under way."""

    refs: Sequence[BlockRef]
    options: DeltaDiT
    count: int
    outputs: Outputs = field(default_factory=Outputs)
    #: In the middle of a range: its input, what it is replaced by (None: it is computed), and the block to come.
    entered: tuple[Any, ...] | None = None
    delta: tuple[Any, ...] | None = None
    following: int = 0
    calls: int = 0
    skipped: int = 0
    reused: dict[str, int] = field(default_factory=lambda: {REAR: 0, FRONT: 0})

    def anchor(self, step: int, steps: int) -> int:
        """Every N-th step computes, counted anew from the step at which the ranges change."""
        turn = first_steps(self.options.gate, steps)
        start = turn if step >= turn else 0
        return step - (step - start) % self.options.interval

    def acting(self) -> tuple[str, range]:
        """The range of blocks that is replaced at this step."""
        call, depth = active_call(), len(self.refs)
        if call.step < first_steps(self.options.gate, call.steps):
            return REAR, range(depth - self.count, depth)
        return FRONT, range(self.count)

    def block(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of block `index`."""
        ref = self.refs[index]
        names = argument_names(ref.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            name, blocks = self.acting()
            self._check_order(index, blocks)
            if index not in blocks:
                return forward(*args, **kwargs)
            states = tuple(argument(n, names, args, kwargs) for n in ref.hidden)
            if index == blocks[0]:
                kept = self.outputs.find(name, self.anchor)
                self.entered, self.delta = states, kept.output if kept else None
                self.reused[name] += kept is not None
            assert self.entered is not None
            self.following = index + 1
            if self.delta is not None:
                self.skipped += 1
                # At the last block only: what a network adds between blocks (Latte's positions in time) is in the
                # delta already.
                if index == blocks[-1]:
                    states = tuple(_sum(s, d) for s, d in zip(self.entered, self.delta, strict=True))
                output = as_output(states)
            else:
                output = forward(*args, **kwargs)
            if index == blocks[-1]:
                if self.delta is None:
                    new = states_of("delta-dit", ref, output)
                    delta = tuple(self._delta(blocks, a, b) for a, b in zip(self.entered, new, strict=True))
                    self.outputs.keep(name, self.anchor, delta)
                self.entered = self.delta = None
            return output

        return run

    def _check_order(self, index: int, blocks: range) -> None:
        expected = None if self.entered is None else self.following
        if index in blocks and expected is None:
            expected = blocks[0]
        if expected is not None and index != expected:
            self.entered = self.delta = None
            raise ConfigError(
                f"delta-dit: {self.refs[index].name} ran before {self.refs[expected].name}, so the blocks are not one "
                f"chain; {OTHERWISE}"
            )

    def _delta(self, blocks: range, before: Tensor | None, after: Tensor | None) -> Tensor | None:
        if before is None or after is None:
            return None
        if before.shape != after.shape:
            raise ConfigError(
                f"delta-dit: {self.refs[blocks[0]].name} is given {tuple(before.shape)} and "
                f"{self.refs[blocks[-1]].name} gives {tuple(after.shape)}, so their difference is not a residual; "
                f"name another number of blocks, or {OTHERWISE}"
            )
        return after - before

    def report(self) -> WrapReport:
        facts = reuse(
            hits=self.outputs.reused,
            misses=self.outputs.computed,
            skipped_share=self.skipped / max(1, self.calls),
            bytes_held=self.outputs.peak,
            blocks=self.count,
            reused_rear=self.reused[REAR],
            reused_front=self.reused[FRONT],
        )
        reason = "" if self.skipped else f"no step lay between two that compute: interval = {self.options.interval}"
        return WrapReport(self.skipped, UNIT, facts, reason)


def _sum(state: Tensor | None, delta: Tensor | None) -> Tensor | None:
    # A stream that the range ends (the text of SD3's last block) ends on a reused step too.
    return None if state is None or delta is None else state + delta


@dataclass(frozen=True)
class DeltaDiT(Plugin):
    """Chen 2024: replace a range of blocks by what it added to its input at the last computed step.

    With h_in and h_out the states before and after the range, a computed step keeps h_out - h_in, and the steps
    up to the next one give h_in + (h_out - h_in) of then. Unlike a kept output, the sum follows the present
    input. Early in a run, when outlines form, which the first blocks make, the last blocks are the range;
    afterwards the first ones are.

    Args:
        interval: N; every N-th step computes, counted anew where the ranges change. 1 computes everything.
        gate: share of the steps in which the last blocks are replaced; in the rest it is the first ones.
        blocks: how many blocks a range has; none is half of them, or one less where blocks over space and over
            time take turns, so that a range ends in the shape in which it begins.

    Raises:
        ConfigError: from the hook, if the network has no chain of blocks longer than the range.
    """

    interval: int = 2
    gate: float = 0.5
    blocks: int | None = None

    summary = "reuse what a range of blocks adds to its input: last blocks early in the run, first blocks late"
    paper = "Delta-DiT (2406.01125), section 4"
    effects = frozenset({"block-outputs", "step-reuse", "counts-steps"})
    bench_options = ({"interval": 2}, {"interval": 3}, {"interval": 4})
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"delta-dit: interval = {self.interval}: expected at least 1, e.g. delta-dit:interval=2")
        if not 0 <= self.gate <= 1:
            raise ConfigError(f"delta-dit: gate = {self.gate}: expected a share of the steps, 0 to 1")
        if self.blocks is not None and self.blocks < 1:
            raise ConfigError(f"delta-dit: blocks = {self.blocks}: expected at least 1, or none for half of them")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.interval == 1

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        refs = chain_of(network, "delta-dit")
        count = len(closed(refs[: len(refs) // 2])) if self.blocks is None else self.blocks
        if count >= len(refs):
            raise ConfigError(
                f"delta-dit: blocks = {count}: expected at most {len(refs) - 1}, because {found(network)} and one must "
                "still be computed"
            )
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="interval = 1 computes all; take 2 or more"))
        ranges, patches = _Ranges(refs, self, count), Patches()

        def install(module: nn.Module) -> nn.Module:
            for index, ref in enumerate(refs):
                patches.replace(ref.module, lambda forward, index=index: ranges.block(index, forward))
            return module

        def undo() -> None:
            patches.undo()
            ranges.outputs.clear()
            ranges.entered = ranges.delta = None

        return Wrap(report=ranges.report, network=install, undo=undo, held=lambda: ranges.outputs.held)
