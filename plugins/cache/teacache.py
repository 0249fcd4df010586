"""TeaCache: skip all blocks while the modulated input of the first one has changed little since they last ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import Call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.chain import row_means
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

NAME = "teacache"


@dataclass(frozen=True)
class Rescaling:
    """Change of the signal -> expected change of the residual, both relative.

    Attributes:
        coefficients: of a polynomial, constant first.
        low, high: the changes it was fitted to; beyond them it says nothing, and the nearest one counts.
    """

    coefficients: tuple[float, ...]
    low: float
    high: float

    def __call__(self, change: float) -> float:
        x = min(max(change, self.low), self.high)
        return max(0.0, sum(c * x**k for k, c in enumerate(self.coefficients)))

    @staticmethod
    def read(content: CacheFile, source: str) -> Rescaling:
        """From a calibration's file.

        Raises:
            ConfigError: it does not hold one.
        """
        coefficients, limits = (_numbers(content.values.get(key)) for key in ("coefficients", "range"))
        if not coefficients or len(limits) != 2:
            raise ConfigError(f"calibration {source}: expected coefficients of a polynomial and its range [low, high]")
        return Rescaling(coefficients, *limits)


def _numbers(value: Any) -> tuple[float, ...]:
    good = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    return tuple(value) if good else ()


@dataclass
class _Kept:
    """Of one branch and evaluation; the first axis of each tensor is the batch.

    Attributes:
        signal, level, step: of the evaluation before, computed or not; `level` is each row's mean absolute value.
        sums: of each row, the expected change since it was computed.
        residual, computed: what is reused, and when each row of it was computed.
    """

    signal: Tensor
    level: Tensor
    step: int
    sums: list[float]
    computed: list[int]
    residual: States | None = None


@dataclass
class _Policy:
    """Accumulates for each row apart; see `suite.plugins.cache._residual.Policy`."""

    options: TeaCache
    rescale: Rescaling
    kept: dict[tuple[str, int], _Kept] = field(default_factory=dict)
    nearest: float = float("inf")
    estimates: list[float] = field(default_factory=list)
    peak: int = 0
    watches: bool = True

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        assert signal is not None
        now, key = signal, (call.key, call.evaluation)
        kept = self.kept.get(key)
        # After steps without this branch, as guidance in an interval leaves them, the change since then is unknown.
        if kept is None or kept.signal.shape != now.shape or kept.step != call.step - 1:
            self.kept[key] = _Kept(now, row_means(now), call.step, [0.0] * batch, [call.step] * batch)
            return list(range(batch))
        level = row_means(now)
        changes: list[float] = (row_means(now - kept.signal) / kept.level).tolist()
        kept.signal, kept.level, kept.step = now, level, call.step
        missing = [row for row, change in enumerate(changes) if not self._reuse(kept, row, change, call)]
        for row in missing:
            kept.sums[row], kept.computed[row] = 0.0, call.step
        self.estimates.extend(kept.sums[row] for row in range(batch) if row not in set(missing))
        return missing

    def _reuse(self, kept: _Kept, row: int, change: float, call: Call) -> bool:
        o = self.options
        kept.sums[row] += self.rescale(change) if change == change else float("inf")
        if call.step < o.warmup or call.step >= call.steps - o.last:
            return False
        self.nearest = min(self.nearest, kept.sums[row])
        recent = call.step - kept.computed[row] <= (o.max_consecutive or call.steps)
        return kept.sums[row] < o.threshold and recent

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        kept = self.kept[call.key, call.evaluation]
        if kept.residual is None or len(rows) == len(kept.sums):
            kept.residual = residual
        else:
            for old, new in zip(kept.residual, residual, strict=True):
                if old is not None and new is not None:
                    old[rows] = new
        self.peak = max(self.peak, self.held())

    def held(self) -> int:
        return sum(size((k.signal, k.residual)) for k in self.kept.values())

    def recall(self, call: Call) -> States:
        residual = self.kept[call.key, call.evaluation].residual
        assert residual is not None
        return residual

    def facts(self) -> dict[str, Any]:
        mean = sum(self.estimates) / len(self.estimates) if self.estimates else None
        return {"error_estimate": mean, "bytes_held": self.peak}

    def why_nothing(self) -> str:
        o = self.options
        if self.nearest == float("inf"):
            return f"no step came after warmup = {o.warmup} and before last = {o.last}"
        return f"the smallest expected change was {self.nearest:.3g}, threshold = {o.threshold:g}; raise it"


@dataclass(frozen=True)
class TeaCache(Calibrated):
    """Liu 2024: the change of the modulated input foretells the change of the output, rescaled by a polynomial.

    The signal is what the first attention of the first block receives: the state, normalised, scaled and shifted by
    the time's embedding. Its relative L1 change from step to step, through the calibrated polynomial, is the expected
    change of what all blocks add. For each row these are summed up from the step at which the row was last computed;
    below the threshold the row is not computed, and what the blocks added then is added again.

    Args:
        threshold: largest expected change of the residual; 0 computes everything. 0.1 to 0.3 is usual.
        file: a calibration of this model and run, from `suite cache calibrate teacache`, or the name of a shipped
            one; by default the shipped one for the model and its number of steps.
        warmup: first steps that are always computed.
        last: final steps that are always computed.
        max_consecutive: most steps in a row in which a sample is reused; None is no limit.

    Raises:
        ConfigError: no calibration, or one of another model or run; from the hook, no chain of blocks.
    """

    threshold: float = 0.15
    file: CalibrationOption | None = None
    warmup: int = 1
    last: int = 0
    max_consecutive: int | None = None

    called = NAME
    summary = "skip all blocks while their modulated input changes little; calibrated, each sample decides for itself"
    paper = "TeaCache (2411.19108), section 3"
    effects = frozenset({"block-outputs", "step-reuse", "dynamic-decision"})
    bench_options = ({"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2})
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0, "file": "teacache-tiny-11"}
    acting_options: ClassVar[dict[str, Any]] = {"threshold": 0.3, "file": "teacache-tiny-11"}

    def __post_init__(self) -> None:
        _calibrated.check_threshold(NAME, self.threshold, 0.15)
        _calibrated.check_counts(NAME, 0, warmup=self.warmup, last=self.last)
        _calibrated.check_counts(NAME, 1, max_consecutive=self.max_consecutive)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        from suite.network.patch import Patches

        content = self.calibration(run)
        policy, patches = _Policy(self, Rescaling.read(content, self.source)), Patches()
        chain = Residual.of(network, NAME, policy)
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.15"))

        def install(module: nn.Module) -> nn.Module:
            chain.install(patches)
            return module

        def report() -> WrapReport:
            facts = chain.facts(**policy.facts(), fit_r2=content.made.get("r2"))
            return WrapReport(chain.skipped, UNIT, facts, "" if chain.skipped else policy.why_nothing())

        def undo() -> None:
            patches.undo()
            policy.kept.clear()

        return Wrap(report=report, network=install, undo=undo, held=policy.held)
