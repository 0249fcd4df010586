"""T-GATE: after a gate step cross-attention is what it was, and guidance ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call, active_call, first_steps
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._outputs import Anchor, Outputs
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.diffusion.guidance import Guidance
    from suite.network import Network
    from suite.run import Run

UNIT = "attention calls reused"


@dataclass
class _Gate:
    """Cross-attention outputs of one run: the newest ones before the gate, and their means after it."""

    share: float
    #: Of each part: branch -> (step, output of that branch alone).
    latest: dict[str, dict[str, tuple[int, Tensor]]] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    held: int = 0
    peak: int = 0

    def clear(self) -> None:
        self.latest.clear()
        self.means.clear()
        self.held = 0

    def closed(self, call: Call) -> bool:
        return call.step >= first_steps(self.share, call.steps)

    def cached(self, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for a cross-attention's `forward`."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            known = part in self.means or part in self.latest
            if not (self.closed(call) and known):
                self.computed += 1
                output = forward(*args, **kwargs)
                # A part that something else skipped before the gate is computed once after it, and then kept.
                if self.share < 1:
                    self._keep(part, call, output)
                return output
            self.reused += 1
            mean = self._mean(part)
            # Branches that arrive after the gate nonetheless all get the same.
            return mean.repeat(len(call.branches), *[1] * (mean.ndim - 1))

        return answer

    def _keep(self, part: str, call: Call, output: Any) -> None:
        if not hasattr(output, "chunk"):
            raise ConfigError(
                f"t-gate: cross-attention {part} returned {type(output).__name__}, expected one tensor; drop "
                "--cache t-gate"
            )
        mine = self.latest.setdefault(part, {})
        for branch, rows in zip(call.branches, output.chunk(len(call.branches)), strict=True):
            before = size(mine[branch][1]) if branch in mine else 0
            mine[branch] = (call.step, rows)
            self.held += size(rows) - before
        self.peak = max(self.peak, self.held)

    def _mean(self, part: str) -> Tensor:
        """Mean over the branches that were evaluated at the newest step."""
        if part not in self.means:
            kept = self.latest.pop(part)
            newest = max(step for step, _ in kept.values())
            rows = [rows for step, rows in kept.values() if step == newest]
            self.means[part] = sum(rows[1:], rows[0]) / len(rows) if len(rows) > 1 else rows[0]
            self.held += size(self.means[part]) - sum(size(rows) for _, rows in kept.values())
        return self.means[part]


def _early(interval: int, warmup: int, share: float) -> Anchor:
    """Between warm-up and gate compute every N-th step; elsewhere every one."""

    def anchor(step: int, steps: int) -> int:
        if step < warmup or step >= first_steps(share, steps):
            return step
        return step - (step - warmup) % interval

    return anchor


@dataclass(frozen=True)
class TGate(Plugin):
    """Zhang 2024: cross-attention converges after some steps; from then on neither it nor guidance is computed.

    With m = ceil(gate T) of T steps: before m everything runs, and from m on each cross-attention gives what it
    gave last, the mean (uncond + cond) / 2 over the branches, and only the conditional branch is evaluated. A run
    with guidance then costs T + m evaluations instead of 2T. A negative prompt acts before m only.

    Args:
        gate: share of the steps before the gate; 1 computes everything.
        interval: N for self-attention between warm-up and gate (the second version of the method); 1 leaves it.
        warmup: first steps in which self-attention is always computed.

    Raises:
        ConfigError: from the hook, if the network has no cross-attention.
    """

    gate: float = 0.4
    interval: int = 1
    warmup: int = 2

    summary = "after a gate step keep cross-attention as it was and end guidance"
    paper = "T-GATE (2404.02747), section 4"
    effects = frozenset(
        {"block-outputs", "step-reuse", "frozen-outputs", "ends-guidance", "call-count", "counts-steps"}
    )
    bench_options = ({"gate": 0.7}, {"gate": 0.5}, {"gate": 0.4, "interval": 2})
    noop_options: ClassVar[dict[str, Any]] = {"gate": 1.0, "interval": 1}

    def __post_init__(self) -> None:
        if not 0 < self.gate <= 1:
            raise ConfigError(f"t-gate: gate = {self.gate}: expected a share above 0, e.g. t-gate:gate=0.4")
        if self.interval < 1:
            raise ConfigError(f"t-gate: interval = {self.interval}: expected at least 1, e.g. t-gate:interval=2")
        if self.warmup < 0:
            raise ConfigError(f"t-gate: warmup = {self.warmup}: expected 0 or more steps")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gate == 1 and self.interval == 1

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        crosses = network.blocks("cross_attention")
        if not crosses:
            raise ConfigError(
                f"t-gate looked for cross_attention, but {found(network)}: the prompt enters elsewhere; drop "
                "--cache t-gate, or end guidance alone with --guidance-interval"
            )
        if self.lossless:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="gate = 1 keeps it open; take e.g. 0.4"))
        selves = network.blocks("attention", "temporal_attention") if self.interval > 1 else ()
        gate, outputs, patches = _Gate(self.gate), Outputs(), Patches()
        early = _early(self.interval, self.warmup, self.gate)

        def install(module: nn.Module) -> nn.Module:
            for part in crosses:
                patches.replace(part.module, lambda forward, name=part.name: gate.cached(name, forward))
            for part in selves:
                patches.replace(part.module, lambda forward, name=part.name: outputs.cached(name, early, forward))
            return module

        def undo() -> None:
            patches.undo()
            gate.clear()
            outputs.clear()

        def report() -> WrapReport:
            reused, computed = gate.reused + outputs.reused, gate.computed + outputs.computed
            facts = reuse(
                hits=reused,
                misses=computed,
                skipped_share=reused / max(1, reused + computed),
                bytes_held=outputs.peak + gate.peak,
                cross_attention_reused=gate.reused,
                self_attention_reused=outputs.reused,
            )
            reason = f"the run ended before its gate, {self.gate:g} of the steps; take fewer" if not reused else ""
            return WrapReport(reused, UNIT, facts, reason)

        return Wrap(
            report=report,
            network=install,
            guidance=self._until_the_gate,
            undo=undo,
            held=lambda: gate.held + outputs.held,
        )

    def _until_the_gate(self, guidance: Guidance) -> Guidance:
        return replace(guidance, share=min(guidance.share, self.gate))
