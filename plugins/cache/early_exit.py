"""Early exit: at noisy times only the first blocks run, by a schedule that is fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call, active_call
from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.hookspecs import hookimpl
from suite.network.chain import OTHERWISE, argument, argument_names, chain_of, states_of
from suite.plugins.cache._calibrated import Calibrated, CalibrationOption
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import nn

    from suite.fitting.cache_file import CacheFile
    from suite.host.models import ModelFolder
    from suite.network import BlockRef, Network
    from suite.recipe import Recipe
    from suite.run import Run

NAME = "early-exit"
UNIT = "block calls left out"


def depth_at(shares: Sequence[float], t: float, blocks: int) -> int:
    """How many blocks run at time t: the k-th of n equal parts of [1, 0] has the k-th share, rounded up."""
    part = min(len(shares) - 1, int((1 - t) * len(shares)))
    return max(1, math.ceil(shares[part] * blocks - 1e-9))


@dataclass
class Exit:
    """A chain of which only the first blocks run; `depth` says how many in a call."""

    refs: Sequence[BlockRef]
    depth: Callable[[Call], int]
    ran: int = 0
    left_out: int = 0
    by_step: dict[int, int] = field(default_factory=dict)

    def block(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Block `index`, or its states as they came."""
        ref = self.refs[index]
        names = argument_names(ref.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            depth = self.depth(call)
            states = tuple(argument(name, names, args, kwargs) for name in ref.hidden)
            if index == 0:
                self.by_step[call.step] = depth
            if index >= depth:
                self.left_out += 1
                return states[0] if len(states) == 1 else states
            self.ran += 1
            output = forward(*args, **kwargs)
            if depth < len(self.refs):
                self._check(ref, states, output)
            return output

        return run

    def _check(self, ref: BlockRef, states: tuple[Any, ...], output: Any) -> None:
        for before, after in zip(states, states_of(NAME, ref, output), strict=True):
            if before is not None and after is not None and before.shape != after.shape:
                raise ConfigError(
                    f"{NAME}: {ref.name} makes {tuple(after.shape)} of {tuple(before.shape)}, so no block may be left "
                    f"out; {OTHERWISE}"
                )


@dataclass(frozen=True)
class EarlyExit(Calibrated):
    """Moon 2024 (ASE): noise needs less of the network than what is nearly data; blocks are dropped by the time.

    The first blocks run, the others hand on what they get, and the network's head follows. Nothing is stored, so
    every solver and every start is served. Networks that were not trained for it lose quality by each block: a
    schedule that is calibrated (CATs, 2104.08803) leaves out what changes the answer by less than a tolerance.

    Args:
        depth: shares of the blocks that run in equal parts of the time axis, from t = 1 to t = 0, rounded up.
        file: depths by step instead, from `suite cache calibrate early-exit`.

    Raises:
        ConfigError: a share that is not above 0 and at most 1; from the hook, no chain of blocks.
    """

    depth: tuple[float, ...] = (0.75, 1.0)
    file: CalibrationOption | None = None

    called = NAME
    summary = "run only the first blocks at noisy times"
    paper = "ASE (Moon 2024, A Simple Early Exiting Framework); CATs (2104.08803) for the calibration"
    effects = frozenset({"block-outputs"})
    bench_options = ({"depth": (0.85, 1.0)}, {}, {"depth": (0.5, 1.0)})
    noop_options: ClassVar[dict[str, Any]] = {"depth": (1.0,)}

    def __post_init__(self) -> None:
        if not self.depth or not all(0 < share <= 1 for share in self.depth):
            shown = "/".join(map(str, self.depth))
            raise ConfigError(
                f"{NAME}: depth = {shown!r}: expected shares above 0 and at most 1, e.g. depth=0.5/0.75/1"
            )

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.file is None and set(self.depth) == {1.0}

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        """A file is a choice here: without one the depths go by the time."""
        if self.file is not None:
            super().check(recipe, folder)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        from suite.network.patch import Patches

        refs, patches = chain_of(network, NAME), Patches()
        chain = Exit(refs, self._depth(len(refs), run))
        if self.lossless:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="depth = 1.0 runs every block; take e.g. 0.75/1"))

        def install(module: nn.Module) -> nn.Module:
            for index, ref in enumerate(refs):
                patches.replace(ref.module, lambda forward, index=index: chain.block(index, forward))
            return module

        def report() -> WrapReport:
            depths = [chain.by_step[step] for step in sorted(chain.by_step)]
            facts = reuse(
                hits=chain.left_out,
                misses=chain.ran,
                skipped_share=chain.left_out / max(1, chain.ran + chain.left_out),
                bytes_held=0,
                depths=depths,
            )
            return WrapReport(chain.left_out, UNIT, facts, "" if chain.left_out else "every step has the full depth")

        return Wrap(report=report, network=install, undo=patches.undo, held=lambda: 0)

    def _depth(self, blocks: int, run: Run) -> Callable[[Call], int]:
        if self.file is None:
            return lambda call: depth_at(self.depth, call.t, blocks)
        return calibrated_depth(self.calibration(run), self.file, blocks)


def calibrated_depth(content: CacheFile, source: str, blocks: int) -> Callable[[Call], int]:
    """(call) -> depth, from a file; the full depth where the file says nothing.

    Raises:
        ConfigError: the file is of a network with another number of blocks, or holds no depths.
    """
    if content.values.get("blocks") != blocks:
        raise ConfigError(f"calibration {source} is of {content.values.get('blocks')} blocks, the network has {blocks}")
    table = cache_file.curve(content, source, "depths")

    def depth(call: Call) -> int:
        step = content.index(call.next_t)
        known = table[call.evaluation][step] if step is not None and call.evaluation < len(table) else None
        return blocks if known is None else max(1, min(blocks, int(known)))

    return depth
