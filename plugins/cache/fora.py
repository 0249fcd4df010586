"""FORA: compute attention and MLPs at every N-th step, reuse their outputs in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._outputs import Outputs, every
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import nn

    from suite.network import Network
    from suite.run import Run

KINDS = ("attention", "cross_attention", "temporal_attention", "mlp")
UNIT = "attention and MLP calls reused"


@dataclass(frozen=True)
class FORA(Plugin):
    """Selvaraju 2024: a static cache of what attention and MLPs add, in any network that has them.

    At steps 0, N, 2N, ... every part is computed and its output kept; at the others the kept output is
    returned as it is. What surrounds the parts still runs: norms, gates and shifts from the current time, and
    the residual sums, so a reused output is scaled for its own step. Each branch (`cond`, `uncond`, or the two
    as one batch) and each evaluation inside a step has outputs of its own.

    Args:
        interval: N; 1 computes everything.
        last: final steps that are always computed.
        kinds: which parts, `attention`, `cross_attention`, `temporal_attention` (over frames) and `mlp`.

    Raises:
        ConfigError: from the hook, if the network has no part of these kinds.
    """

    interval: int = 2
    last: int = 0
    kinds: tuple[str, ...] = KINDS

    summary = "reuse attention and MLP outputs for N - 1 of every N steps"
    paper = "FORA (2407.01425), section 3"
    effects = frozenset({"block-outputs", "step-reuse"})
    bench_options = ({"interval": 2}, {"interval": 3}, {"interval": 4})
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"fora: interval = {self.interval}: expected at least 1, e.g. fora:interval=2")
        if self.last < 0:
            raise ConfigError(f"fora: last = {self.last}: expected 0 or more steps")
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ConfigError(f"fora: kinds = {'/'.join(self.kinds)!r}: expected some of {'/'.join(KINDS)}")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.interval == 1

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        parts = network.blocks(*self.kinds)
        if not parts:
            raise ConfigError(
                f"fora looked for {', '.join(self.kinds)}, but {found(network)}; drop --cache fora, or name kinds "
                "that it has"
            )
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="interval = 1 computes all; take 2 or more"))
        outputs, patches, anchor = Outputs(), Patches(), every(self.interval, self.last)

        def install(module: nn.Module) -> nn.Module:
            for part in parts:
                patches.replace(part.module, lambda forward, name=part.name: outputs.cached(name, anchor, forward))
            return module

        def report() -> WrapReport:
            reason = "" if outputs.reused else f"no step lay between two that are computed: interval = {self.interval}"
            return WrapReport(outputs.reused, UNIT, outputs.facts(), reason)

        def undo() -> None:
            patches.undo()
            outputs.clear()

        return Wrap(report=report, network=install, undo=undo, held=lambda: outputs.held)
