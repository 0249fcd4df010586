"""MagCache: skip all blocks where the calibrated ratio of residual magnitudes says that they would change little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call
from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.hookspecs import hookimpl
from suite.plugins.cache import _calibrated
from suite.plugins.cache._calibrated import Calibrated, CalibrationOption
from suite.plugins.cache._residual import UNIT, Residual
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.fitting.cache_file import CacheFile
    from suite.network import Network
    from suite.network.chain import States
    from suite.run import Run

NAME = "magcache"


def skips(ratios: Sequence[float | None], threshold: float, max_skip: int, retained: int) -> list[float | None]:
    """Which steps are skipped, and the error that is accumulated there; None is a step that is computed.

    From step `retained` on the product of the ratios since the last computed step is followed; the distances of
    these products from 1 add up to the error. A step is skipped while the error is at most the threshold and at most
    `max_skip` steps were skipped in a row.

    Args:
        ratios: magnitude of the residual at each step over that at the step before; None where there was no
            evaluation, as Heun's second one at the last step.
    """
    out: list[float | None] = []
    product, error, count = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if ratio is not None and step >= retained and step > 0 and ratios[step - 1] is not None:
            product, count = product * ratio, count + 1
            error += abs(1 - product)
            if error <= threshold and count <= max_skip:
                out.append(error)
                continue
        product, error, count = 1.0, 0.0, 0
        out.append(None)
    return out


@dataclass
class _Policy:
    """All rows or none, from the step alone; see `suite.plugins.cache._residual.Policy`."""

    content: CacheFile
    plan: list[list[float | None]]
    kept: dict[tuple[str, int], tuple[int, States]] = field(default_factory=dict)
    estimates: list[float] = field(default_factory=list)
    peak: int = 0
    watches: bool = False

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        del signal
        step, kept = self.content.index(call.next_t), self.kept.get((call.key, call.evaluation))
        if step is None or kept is None or call.evaluation >= len(self.plan):
            return list(range(batch))
        plan = self.plan[call.evaluation]
        error = plan[step]
        # A branch may come back after steps without it: only the residual that the plan means is reused.
        since = next((k for k in range(step - 1, -1, -1) if plan[k] is None), None)
        if error is None or since != kept[0]:
            return list(range(batch))
        self.estimates.append(error)
        return []

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        del rows
        step = self.content.index(call.next_t)
        if step is not None:
            self.kept[call.key, call.evaluation] = (step, residual)
            self.peak = max(self.peak, self.held())

    def held(self) -> int:
        return sum(size(residual) for _, residual in self.kept.values())

    def recall(self, call: Call) -> States:
        return self.kept[call.key, call.evaluation][1]

    def facts(self) -> dict[str, Any]:
        mean = sum(self.estimates) / len(self.estimates) if self.estimates else None
        return {"error_estimate": mean, "bytes_held": self.peak}


@dataclass(frozen=True)
class MagCache(Calibrated):
    """Ma 2025: the magnitude of what the blocks add falls smoothly and alike for all prompts.

    Its ratios from step to step are measured once; see `skips` for the rule. Which steps are skipped follows from the
    file and the options before the run, and is the same for all rows and ranks. In a skipped step what the blocks
    added at the last computed one is added again.

    Args:
        threshold: largest accumulated error; 0 computes everything. 0.06 is usual.
        file: a calibration of this model and run, from `suite cache calibrate magcache`, or the name of a shipped
            one; by default the shipped one for the model and its number of steps.
        max_skip: K, most steps in a row that are skipped.
        retention: share of the steps, at the start, that are always computed.

    Raises:
        ConfigError: no calibration, or one of another model or run; from the hook, no chain of blocks.
    """

    threshold: float = 0.06
    file: CalibrationOption | None = None
    max_skip: int = 3
    retention: float = 0.2

    called = NAME
    summary = "skip all blocks where a calibrated curve of residual magnitudes allows it"
    paper = "MagCache (2506.09045), section 3"
    effects = frozenset({"block-outputs", "step-reuse"})
    bench_options = ({"threshold": 0.03}, {"threshold": 0.06}, {"threshold": 0.12})
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0, "file": "magcache-tiny-11"}
    acting_options: ClassVar[dict[str, Any]] = {"threshold": 0.3, "file": "magcache-tiny-11"}

    def __post_init__(self) -> None:
        _calibrated.check_threshold(NAME, self.threshold, 0.06)
        _calibrated.check_counts(NAME, 1, max_skip=self.max_skip)
        if not 0 <= self.retention <= 1:
            raise ConfigError(f"magcache: retention = {self.retention}: expected a share from 0 to 1, e.g. 0.2")

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        from suite.network.patch import Patches

        content = self.calibration(run)
        ratios = cache_file.curve(content, self.source, "ratios")
        retained = int(self.retention * run.steps + 0.5)
        plan = [skips(r, self.threshold, self.max_skip, retained) for r in ratios]
        policy, patches = _Policy(content, plan), Patches()
        chain = Residual.of(network, NAME, policy)
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.06"))

        def install(module: nn.Module) -> nn.Module:
            chain.install(patches)
            return module

        def report() -> WrapReport:
            reason = (
                ""
                if chain.skipped
                else (
                    f"no step lay within threshold = {self.threshold:g} after the first {retained}; raise it, or lower "
                    "retention"
                )
            )
            return WrapReport(chain.skipped, UNIT, chain.facts(**policy.facts()), reason)

        def undo() -> None:
            patches.undo()
            policy.kept.clear()

        return Wrap(report=report, network=install, undo=undo, held=policy.held)
