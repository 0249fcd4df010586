"""TaylorSeer: compute attention and MLPs at every N-th step, and forecast their outputs in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from suite.call import Call, active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._forecast import Check, History, mean_error
from suite.plugins.cache._residual import Residual
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import Network
    from suite.network.chain import States
    from suite.run import Run

GOLDEN = 0.6180339887498949
KINDS = ("attention", "cross_attention", "mlp")
UNITS = {"parts": "attention and MLP calls forecast", "residual": "block evaluations forecast (rows x blocks)"}


@dataclass
class _Forecasts:
    """Histories of every part, and which calls they answer; decided from the active call alone."""

    options: TaylorSeer
    kept: dict[str, dict[tuple[str, int], History]] = field(default_factory=dict)
    computed: int = 0
    forecast: int = 0
    held: int = 0
    peak: int = 0
    missed: list[Check] = field(default_factory=list)
    watches: bool = False

    def history(self, part: str, call: Call) -> History:
        """What is kept of this part for the call's branch and evaluation."""
        mine, key = self.kept.setdefault(part, {}), (call.key, call.evaluation)
        if key not in mine:
            o = self.options
            mine[key] = History(o.order, o.interval, o.form, o.scale)
        return mine[key]

    def ready(self, history: History, call: Call) -> bool:
        """Whether this call is answered by a forecast."""
        o = self.options
        if call.step < o.warmup or call.step % o.interval == 0 or call.step >= call.steps - o.last:
            return False
        # Outputs of an older interval count as nothing: a branch may come back after steps without it, as guidance
        # in an interval does, and a second evaluation is missing from some steps.
        return history.newest >= 0 and history.newest // o.interval == call.step // o.interval

    def store(self, history: History, call: Call, output: Any, number: int = 0) -> None:
        """Keep a computed output, and note how far from it a forecast would have been.

        Of part `number` that is done in its turn only, one part at every second interval, spread over the network by
        the golden ratio: of all parts it would cost some percent of an evaluation.
        """
        turn = call.step // self.options.interval
        if turn % 2 and number == int(turn * GOLDEN % 1 * len(self.kept)):
            missed = history.missed(call, output)
            self.missed.extend(() if missed is None else (missed,))
        if call.step + 1 >= call.steps - self.options.last:
            self.held -= history.bytes
            history.clear()  # every step that is left is computed
            return
        before = history.bytes
        history.push(call, output)
        self.held += history.bytes - before
        self.peak = max(self.peak, self.held)

    def part(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for `forward`."""

        number, mine = len(self.kept), self.kept.setdefault(name, {})
        interval = self.options.interval

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            history = mine.get((call.key, call.evaluation)) or self.history(name, call)
            if call.step % interval and self.ready(history, call):
                self.forecast += 1
                return history.at(call.t)
            self.computed += 1
            output = forward(*args, **kwargs)
            self.store(history, call, output, number)
            return output

        return answer

    # As the policy of a chain: one part, all rows or none.

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        del signal
        return [] if self.ready(self.history("", call), call) else list(range(batch))

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        del rows
        self.store(self.history("", call), call, residual)

    def recall(self, call: Call) -> States:
        return self.history("", call).at(call.t)

    def facts(self) -> dict[str, Any]:
        # What a forecast over a whole interval misses, seen at the steps that are computed anyway.
        return {"bytes_held": self.peak, "error_estimate": mean_error(self.missed)}

    def clear(self) -> None:
        """Forget everything that is kept."""
        self.kept.clear()
        self.held = 0


@dataclass(frozen=True)
class TaylorSeer(Plugin):
    """Liu 2025: a static cache like FORA whose outputs are extrapolated in time instead of repeated.

    Computed are the first `warmup` steps, steps 0, N, 2N, ... and the `last` ones. In between an output is forecast
    from its last `order` + 1 computed values, at their own times. Order 0 is FORA. The forms are those of
    `suite.plugins.cache._forecast.weights`; of them only `adams` is of order `order` + 1 in the step.

    Args:
        interval: N; 1 computes everything.
        order: m, degree of the forecast.
        warmup: first steps that are always computed.
        last: final steps that are always computed.
        level: `parts` forecasts what attention and MLPs give, and norms, gates and residual sums run at every step;
            `residual` forecasts what all blocks add together, and skips them whole.
        form: `taylor` is the paper's.
        scale: of the form `hermite`.
        kinds: which parts at the level `parts`.

    Raises:
        ConfigError: from the hook, if the network has no part of these kinds or no chain of blocks.
    """

    interval: int = 3
    order: int = 1
    warmup: int = 1
    last: int = 0
    level: Literal["parts", "residual"] = "parts"
    form: Literal["taylor", "adams", "hermite"] = "taylor"
    scale: float = 0.5
    kinds: tuple[str, ...] = KINDS

    summary = "forecast attention and MLP outputs for N - 1 of every N steps"
    paper = "TaylorSeer (2503.06923), Eq. 6; forms of AB-Cache (2504.10540) and HiCache (2508.16984)"
    bench_options = ({"interval": 2}, {"interval": 3}, {"interval": 3, "order": 2})
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        check_forecast("taylorseer", self.interval, self.order, self.warmup, self.last, self.scale)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ConfigError(f"taylorseer: kinds = {'/'.join(self.kinds)!r}: expected some of {'/'.join(KINDS)}")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.interval == 1

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        words = {"block-outputs", "step-reuse"}
        # Differences of what fresh noise went through are noise; of parts, the next ones still see the state.
        return frozenset(words | {"needs-deterministic-step"} if self.level == "residual" else words)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        forecasts, patches = _Forecasts(self), Patches()
        unit = UNITS[self.level]
        chain = Residual.of(network, "taylorseer", forecasts) if self.level == "residual" else None
        parts = () if chain else network.blocks(*self.kinds)
        if not chain and not parts:
            raise ConfigError(
                f"taylorseer looked for {', '.join(self.kinds)}, but {found(network)}; drop --cache taylorseer, or "
                "name kinds that it has"
            )
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, unit, reason="interval = 1 computes all; take 2 or more"))

        def install(module: nn.Module) -> nn.Module:
            if chain:
                chain.install(patches)
            for part in parts:
                patches.replace(part.module, lambda forward, name=part.name: forecasts.part(name, forward))
            return module

        def report() -> WrapReport:
            did = chain.skipped if chain else forecasts.forecast
            facts = chain.facts(**forecasts.facts()) if chain else _shares(forecasts)
            return WrapReport(did, unit, facts, "" if did else why_nothing(self))

        def undo() -> None:
            patches.undo()
            forecasts.clear()

        return Wrap(report=report, network=install, undo=undo, held=lambda: forecasts.held)


def _shares(forecasts: _Forecasts) -> dict[str, Any]:
    share = forecasts.forecast / max(1, forecasts.computed + forecasts.forecast)
    return reuse(hits=forecasts.forecast, misses=forecasts.computed, skipped_share=share, **forecasts.facts())


def check_forecast(who: str, interval: int, order: int, warmup: int, last: int, scale: float) -> None:
    """Ranges of the options that every forecast has.

    Raises:
        ConfigError: one is out of its range.
    """
    if interval < 1:
        raise ConfigError(f"{who}: interval = {interval}: expected at least 1, e.g. {who}:interval=3")
    if not 0 <= order <= 4:
        raise ConfigError(f"{who}: order = {order}: expected 0 to 4, e.g. {who}:order=1")
    for name, value in (("warmup", warmup), ("last", last)):
        if value < 0:
            raise ConfigError(f"{who}: {name} = {value}: expected 0 or more steps")
    if not (0 < scale <= 1 and math.isfinite(scale)):
        raise ConfigError(f"{who}: scale = {scale}: expected more than 0 and at most 1, e.g. 0.5")


def why_nothing(options: Any) -> str:
    """The reason of a forecast that no step was left to."""
    o = options
    return f"no step lay between two that are computed: interval = {o.interval}, warmup = {o.warmup}, last = {o.last}"
