"""Forecast the denoiser itself: evaluate the network at every N-th step, extrapolate its prediction in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from suite.diffusion.coefficients import expand
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.cache._forecast import Check, History, mean_error
from suite.plugins.cache.taylorseer import check_forecast, why_nothing
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.diffusion.noise import NoiseSchedule

UNIT = "denoiser calls forecast"


@dataclass
class _Store:
    """What one run keeps: a history of each branch and evaluation."""

    options: Forecast
    noise: NoiseSchedule
    kept: dict[tuple[str, int], History] = field(default_factory=dict)
    computed: int = 0
    forecast: int = 0
    peak: int = 0
    missed: list[Check] = field(default_factory=list)

    def held(self) -> int:
        return sum(h.bytes for h in self.kept.values())

    def report(self) -> WrapReport:
        o = self.options
        facts = reuse(
            hits=self.forecast,
            misses=self.computed,
            skipped_share=self.forecast / max(1, self.computed + self.forecast),
            bytes_held=self.peak,
            # What a forecast over a whole interval misses, seen at the steps that are computed anyway.
            error_estimate=mean_error(self.missed),
        )
        return WrapReport(self.forecast, UNIT, facts, "" if self.forecast else why_nothing(o))


@dataclass(frozen=True)
class _Forecasting:
    """A Denoiser in front of another one."""

    inner: Denoiser
    store: _Store

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        store, o = self.store, self.store.options
        key = (call.key, call.evaluation)
        history = store.kept.setdefault(key, History(o.order, o.interval, o.form, o.scale))
        always = call.step < o.warmup or call.step % o.interval == 0 or call.step >= call.steps - o.last
        same = history.newest >= 0 and history.newest // o.interval == call.step // o.interval
        if not always and same:
            store.forecast += 1
            return self._as_x0(history.at(call.t), x, t)
        store.computed += 1
        x0 = self.inner.denoise(x, t, cond, call)
        value = self._of_x0(x0, x, t)
        if (missed := history.missed(call, value)) is not None:
            store.missed.append(missed)
        history.push(call, value)
        store.peak = max(store.peak, store.held())
        return x0

    def _of_x0(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The quantity that is forecast; of x0 itself no copy is made."""
        from suite.diffusion.prediction import Prediction, from_x0

        kind = Prediction(self.store.options.quantity)
        if kind is Prediction.SAMPLE:
            return x0
        return from_x0(kind, x0, x, expand(self.store.noise.alpha(t), x), expand(self.store.noise.sigma(t), x))

    def _as_x0(self, value: Tensor, x: Tensor, t: Tensor) -> Tensor:
        from suite.diffusion.prediction import Prediction, to_x0

        kind = Prediction(self.store.options.quantity)
        if kind is Prediction.SAMPLE:
            return value
        return to_x0(kind, value, x, expand(self.store.noise.alpha(t), x), expand(self.store.noise.sigma(t), x))


@dataclass(frozen=True)
class Forecast(Plugin):
    """Evaluate at steps 0, N, 2N, ...; in between, extrapolate the prediction over the times of the run.

    Computed are the first `warmup` steps, those and the `last` ones. With order 0 the prediction is repeated, which
    for DDIM is DDIM with N times fewer steps if x0, epsilon or epsilon - x0 is repeated: a DDIM step keeps all three.
    It does not keep v = alpha epsilon - sigma x0, and a repeated v is another method, also of first order. A forecast
    of order m caps the solver's order p at min(p, m + 1) with the form `adams`; see
    `suite.plugins.cache._forecast.weights` for the forms.

    Args:
        interval: N; 1 computes everything.
        order: m, degree of the forecast.
        warmup: first steps that are always computed.
        last: final steps that are always computed.
        form: how to extrapolate.
        quantity: what is extrapolated, in diffusers' words: x0 (`sample`), `epsilon`, `v_prediction`,
            `flow_prediction`. `epsilon` cannot be turned into x0 where alpha = 0, and is large there before.
        scale: of the form `hermite`.

    Raises:
        ConfigError: from the hook, for tokens: probabilities of a state that has changed since.
    """

    interval: int = 2
    order: int = 1
    warmup: int = 1
    last: int = 0
    form: Literal["taylor", "adams", "hermite"] = "adams"
    quantity: Literal["sample", "epsilon", "v_prediction", "flow_prediction"] = "sample"
    scale: float = 0.5

    summary = "forecast the denoiser's prediction for N - 1 of every N steps"
    paper = "AB-Cache (2504.10540); forms of TaylorSeer (2503.06923) and HiCache (2508.16984)"
    effects = frozenset({"denoiser-output", "step-reuse", "call-count"})
    bench_options = ({"interval": 2, "order": 0}, {"interval": 2}, {"interval": 3})
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        check_forecast("forecast", self.interval, self.order, self.warmup, self.last, self.scale)

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.interval == 1

    @hookimpl
    def cache(self, noise: NoiseSchedule) -> Wrap:
        if noise.discrete:
            raise ConfigError(
                "forecast is for real vectors: p(x0 given x_t) of tokens says which are known at that step, and an old "
                "one forgets those that became known since; drop --cache forecast"
            )
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="interval = 1 computes all; take 2 or more"))
        store = _Store(self, noise)
        return Wrap(
            denoiser=lambda inner: _Forecasting(inner, store),
            report=store.report,
            undo=store.kept.clear,
            held=store.held,
        )
