"""Parts of blocks whose outputs are reused at steps that a calibration has fixed before the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from suite.call import active_call
from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import nn

    from suite.fitting.cache_file import CacheFile
    from suite.network import BlockRef, Network

KINDS = ("attention", "cross_attention", "mlp")
UNIT = "attention and MLP calls reused"

#: (part, evaluation, step, reused output) -> what is returned for it.
Adjust = Callable[[str, int, int, Any], Any]


@dataclass
class Scheduled:
    """The outputs of every part during one run.

    Attributes:
        content: knows at which step a call is.
        plan: part -> evaluations x steps, True where the part is reused.
        adjust: changes a reused output; None leaves it.
    """

    content: CacheFile
    plan: Mapping[str, Sequence[Sequence[bool]]]
    adjust: Adjust | None = None
    kept: dict[tuple[str, str, int], tuple[int, Any]] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    held: int = 0
    peak: int = 0

    def part(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for `forward`."""
        plan = self.plan[name]

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            step, key = self.content.index(call.next_t), (name, call.key, call.evaluation)
            row = plan[call.evaluation] if call.evaluation < len(plan) else ()
            since = computed_before(row, step) if step is not None and row and row[step] else None
            # A branch may come back after steps without it: only the output that the plan means is reused.
            if since is not None and key in self.kept and self.kept[key][0] == since:
                self.reused += 1
                output = self.kept[key][1]
                return output if self.adjust is None else self.adjust(name, call.evaluation, step or 0, output)
            self.computed += 1
            if key in self.kept:
                self.held -= size(self.kept.pop(key)[1])
            output = forward(*args, **kwargs)
            if step is not None and step + 1 < len(row) and row[step + 1]:
                self.kept[key] = (step, output)
                self.held += size(output)
                self.peak = max(self.peak, self.held)
            return output

        return answer

    def facts(self) -> dict[str, Any]:
        """For the report."""
        share = self.reused / max(1, self.computed + self.reused)
        return reuse(hits=self.reused, misses=self.computed, skipped_share=share, bytes_held=self.peak)

    def clear(self) -> None:
        """Forget everything that is kept."""
        self.kept.clear()
        self.held = 0


def computed_before(row: Sequence[bool], step: int) -> int | None:
    """The last step before this one that is not reused."""
    for earlier in range(step - 1, -1, -1):
        if not row[earlier]:
            return earlier
    return None


def parts_of(network: Network, who: str, tables: Mapping[str, Any]) -> tuple[BlockRef, ...]:
    """The parts that a calibration speaks of.

    Raises:
        ConfigError: the network has others.
    """
    parts = {ref.name: ref for ref in network.blocks(*KINDS)}
    if parts.keys() != tables.keys():
        odd = sorted(parts.keys() ^ tables.keys())
        raise ConfigError(
            f"{who}: the calibration is of a network with other parts: {odd[0]} is in one of them alone; calibrate anew"
        )
    return tuple(parts.values())


def table(content: CacheFile, source: str, name: str) -> dict[str, list[list[float | None]]]:
    """Part -> evaluations x steps numbers, from a file.

    Raises:
        ConfigError: the file does not hold them.
    """
    return dict(cache_file.curve(content, source, name, rows=()))


def wrap_of(parts: Sequence[BlockRef], scheduled: Scheduled, facts: Mapping[str, Any], reason: str) -> Wrap:
    """The wrap that reuses by this schedule; `reason` says why it may have done nothing."""
    from suite.network.patch import Patches

    patches = Patches()

    def install(module: nn.Module) -> nn.Module:
        for part in parts:
            patches.replace(part.module, lambda forward, name=part.name: scheduled.part(name, forward))
        return module

    def undo() -> None:
        patches.undo()
        scheduled.clear()

    def report() -> WrapReport:
        return WrapReport(scheduled.reused, UNIT, scheduled.facts() | dict(facts), "" if scheduled.reused else reason)

    return Wrap(report=report, network=install, undo=undo, held=lambda: scheduled.held)


def leaves(output: Any) -> list[Any]:
    """The tensors of an output in order."""
    if isinstance(output, tuple | list):
        return [leaf for o in output for leaf in leaves(o)]
    return [] if output is None else [output]


def rebuilt(output: Any, tensors: list[Any]) -> Any:
    """An output of the same structure with these tensors; they are taken from the front of the list."""
    if isinstance(output, tuple | list):
        return type(output)(rebuilt(o, tensors) for o in output)
    return None if output is None else tensors.pop(0)
