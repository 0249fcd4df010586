"""FORA: compute attention and MLPs at every N-th step, reuse their outputs in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call, active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.cache._shared import found, size
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import nn

    from suite.network import Network
    from suite.run import Run

KINDS = ("attention", "cross_attention", "mlp")
UNIT = "attention and MLP calls reused"


@dataclass
class _Kept:
    """An output, and the interval of steps in which it was computed."""

    window: int
    output: Any


@dataclass
class _Outputs:
    """The outputs of every part; what to do with them is decided from the active call alone."""

    interval: int
    last: int
    kept: dict[str, dict[tuple[str, int], _Kept]] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    held: int = 0
    peak: int = 0

    def cached(self, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for `forward`."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            window, key = call.step // self.interval, (call.branch, call.evaluation)
            mine = self.kept.setdefault(part, {})
            fresh = call.step % self.interval == 0 or call.step >= call.steps - self.last
            # An older window counts as nothing stored: a branch may come back after steps without it, as
            # guidance in an interval does, and a second evaluation is missing from some steps.
            if not fresh and key in mine and mine[key].window == window:
                self.reused += 1
                return mine[key].output
            for stale in [k for k, v in mine.items() if k == key or v.window != window]:
                self.held -= size(mine.pop(stale).output)
            self.computed += 1
            output = forward(*args, **kwargs)
            if self._needed(call):
                mine[key] = _Kept(window, output)
                self.held += size(output)
                self.peak = max(self.peak, self.held)
            return output

        return answer

    def _needed(self, call: Call) -> bool:
        """Whether the next step will reuse what this one computes."""
        following = call.step + 1
        return following % self.interval != 0 and following < call.steps - self.last

    def report(self) -> WrapReport:
        facts = {
            "computed": self.computed,
            "reused": self.reused,
            "skipped_share": self.reused / max(1, self.computed + self.reused),
            "bytes_held": self.peak,
        }
        reason = "" if self.reused else f"no step lay between two that are computed: interval = {self.interval}"
        return WrapReport(self.reused, UNIT, facts, reason)


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
        kinds: which parts, `attention`, `cross_attention` and `mlp`.

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
        from suite.patch import Patches

        parts = network.blocks(*self.kinds)
        if not parts:
            raise ConfigError(
                f"fora looked for {', '.join(self.kinds)}, but {found(network)}; drop --cache fora, or name kinds "
                "that it has"
            )
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="interval = 1 computes all; take 2 or more"))
        outputs, patches = _Outputs(self.interval, self.last), Patches()

        def install(module: nn.Module) -> nn.Module:
            for part in parts:
                patches.replace(part.module, lambda forward, name=part.name: outputs.cached(name, forward))
            return module

        def undo() -> None:
            patches.undo()
            outputs.kept.clear()

        return Wrap(report=outputs.report, network=install, undo=undo)
