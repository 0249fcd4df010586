"""Pyramid attention broadcast: each kind of attention is computed at its own interval, in the middle of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._outputs import Outputs, within
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import nn

    from suite.network import Network
    from suite.run import Run

KINDS = ("attention", "temporal_attention", "cross_attention", "mlp")
UNIT = "attention and MLP calls reused"


@dataclass(frozen=True)
class PAB(Plugin):
    """Zhao 2024: attention outputs change least in the middle of a run, those across modalities least of all.

    In the steps of the window, a part of kind k is computed at multiples of N_k and its whole output is handed out
    (broadcast) until the next one; outside, every part is computed. The first steps of the window reuse what the
    step before it computed. Full attention over space and time counts as `attention`.

    Args:
        attention: N of attention within a frame, a picture, a text or a sound; 1 computes every step.
        temporal_attention: N of attention from frame to frame.
        cross_attention: N of attention to the prompt.
        mlp: N of MLPs.
        start, end: the window, as shares of the run's steps.

    Raises:
        ConfigError: from the hook, if the network has no part of a kind whose N is more than 1.
    """

    attention: int = 2
    temporal_attention: int = 4
    cross_attention: int = 6
    mlp: int = 1
    start: float = 0.15
    end: float = 0.9

    summary = "reuse attention outputs at an interval for each kind, in the middle of the run"
    paper = "Pyramid Attention Broadcast (2408.12588), section 3"
    effects = frozenset({"block-outputs", "step-reuse", "counts-steps"})
    bench_options = ({"attention": 2, "cross_attention": 2}, {}, {"attention": 3, "mlp": 2})
    noop_options: ClassVar[dict[str, Any]] = dict.fromkeys(KINDS, 1)

    def __post_init__(self) -> None:
        for kind in KINDS:
            if getattr(self, kind) < 1:
                raise ConfigError(f"pab: {kind} = {getattr(self, kind)}: expected at least 1, e.g. pab:{kind}=2")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"pab: start = {self.start}, end = {self.end}: expected two increasing shares of the run, e.g. "
                "pab:start=0.15,end=0.9"
            )

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(getattr(self, kind) == 1 for kind in KINDS)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        anchors = {
            kind: within(interval, self.start, self.end) for kind in KINDS if (interval := getattr(self, kind)) > 1
        }
        parts = network.blocks(*anchors) if anchors else ()
        if not anchors:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="every interval is 1; take pab:attention=2 or more"))
        if not parts:
            raise ConfigError(
                f"pab looked for {', '.join(anchors)}, but {found(network)}; name an interval for a kind that it has"
            )
        outputs, patches = Outputs(), Patches()

        def install(module: nn.Module) -> nn.Module:
            for part in parts:
                patches.replace(
                    part.module, lambda forward, part=part: outputs.cached(part.name, anchors[part.kind], forward)
                )
            return module

        def undo() -> None:
            patches.undo()
            outputs.clear()

        def report() -> WrapReport:
            reason = f"no step of the window from {self.start:g} to {self.end:g} lay between two that are computed"
            return WrapReport(outputs.reused, UNIT, outputs.facts(), "" if outputs.reused else reason)

        return Wrap(report=report, network=install, undo=undo, held=lambda: outputs.held)
