"""Block Caching: each part has steps of its own at which it is computed; reused outputs are scaled and shifted."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugins.cache import _calibrated
from suite.plugins.cache._calibrated import Calibrated, CalibrationOption
from suite.plugins.cache._scheduled import UNIT, Scheduled, leaves, parts_of, rebuilt, table, wrap_of
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import Tensor

    from suite.network import Network
    from suite.run import Run

NAME = "block-cache"

#: Of one tensor: scale and shift of each channel.
Affine = tuple[Sequence[float], Sequence[float]]


def reuse(changes: Sequence[float | None], threshold: float) -> list[bool]:
    """The cumulative rule: a part is reused while its changes since it was computed add up to less than delta.

    Args:
        changes: of each step against the step before, relative; None where nothing was measured, as at the first.
        threshold: delta.
    """
    out, total = [], 0.0
    for change in changes:
        total = total + change if change is not None else float("inf")
        out.append(total < threshold)
        total = total if out[-1] else 0.0
    return out


def encoded(affines: Sequence[Affine]) -> str:
    """Scales and shifts of the tensors of one output as text: float16 in base64, tensors separated by commas."""
    import numpy as np

    return ",".join(base64.b64encode(np.asarray(a, dtype="<f2").tobytes()).decode() for a in affines)


def decoded(text: Any) -> list[Affine]:
    """The inverse of `encoded`.

    Raises:
        ConfigError: the text is not one.
    """
    import numpy as np

    try:
        arrays = [np.frombuffer(base64.b64decode(t, validate=True), "<f2").astype(float) for t in text.split(",")]
        return [(a[: len(a) // 2].tolist(), a[len(a) // 2 :].tolist()) for a in arrays]
    except (AttributeError, ValueError, binascii.Error) as error:
        raise ConfigError(f"block-cache: scales and shifts of the calibration cannot be read: {error}") from error


@dataclass
class _Adjustment:
    """Scales and shifts of a run, decoded when they are first needed."""

    texts: Mapping[str, Mapping[str, str]]
    made: dict[tuple[str, int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(self, part: str, evaluation: int, step: int, output: Any) -> Any:
        tensors, key = leaves(output), (part, evaluation, step)
        if key not in self.made:
            affines = decoded(self.texts.get(part, {}).get(f"{evaluation}/{step}"))
            if [len(scale) for scale, _ in affines] != [t.shape[-1] for t in tensors]:
                raise ConfigError(f"block-cache: {part} has other channels than its calibration; calibrate anew")
            self.made[key] = [(t.new_tensor(a), t.new_tensor(b)) for t, (a, b) in zip(tensors, affines, strict=True)]
        changed = [t * scale + shift for t, (scale, shift) in zip(tensors, self.made[key], strict=True)]
        return rebuilt(output, changed)


@dataclass(frozen=True)
class BlockCache(Calibrated):
    """Wimbauer 2024: a part is computed anew when its measured changes have added up to delta.

    How much the output of every part changes from step to step is measured beforehand; early parts of a network and
    middle steps change little. A reused output is scaled and shifted channel by channel, by what brings it nearest, in
    least squares, to what the part would have given on the calibration's samples.

    Args:
        file: a calibration of this model and run, from `suite cache calibrate block-cache`, or the name of a shipped
            one; by default the shipped one for the model and its number of steps.
        threshold: delta; by default the file's, and 0 computes everything.
        adjust: scale and shift. They are fitted to the file's delta, and another one needs adjust=false.

    Raises:
        ConfigError: no calibration, or one of another model or run; from the hook, other parts.
    """

    file: CalibrationOption | None = None
    threshold: float | None = None
    adjust: bool = True

    called = NAME
    summary = "reuse each attention and MLP for as long as its measured changes allow, scaled and shifted"
    paper = "Block Caching (2312.03209), sections 3.2 and 3.3"
    effects = frozenset({"block-outputs", "step-reuse"})
    bench_options = ()  # needs a calibration file of the very run
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0, "file": "block-cache-tiny-11"}
    acting_options: ClassVar[dict[str, Any]] = {"file": "block-cache-tiny-11"}

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _calibrated.check_threshold(NAME, self.threshold, 0.2)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        content, source = self.calibration(run), self.source
        changes, fitted = table(content, source, "changes"), content.values.get("threshold")
        parts = parts_of(network, NAME, changes)
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; drop it, or take more"))
        if not isinstance(fitted, int | float):
            raise ConfigError(f"calibration {source}: expected a number `threshold`")
        delta = float(fitted) if self.threshold is None else self.threshold
        texts = content.values.get("adjust") if self.adjust else None
        if texts and delta != fitted:
            raise ConfigError(
                f"block-cache: scales and shifts of {source} are fitted to threshold = {fitted:g}, not {delta:g}; "
                f"write adjust=false, or calibrate with block-cache:threshold={delta:g}"
            )
        plan = {part: [reuse(row, delta) for row in rows] for part, rows in changes.items()}
        if texts:  # what has no scale and shift is computed
            plan = {part: _where(rows, texts.get(part, {})) for part, rows in plan.items()}
        scheduled = Scheduled(content, plan, _Adjustment(texts) if texts else None)
        # What the plan expects of every reused output, before it is adjusted.
        estimates = [
            v for part, rows in changes.items() for e, row in enumerate(rows) for v in _sums(row, plan[part][e])
        ]
        facts = {"error_estimate": sum(estimates) / len(estimates) if estimates else None, "adjusted": bool(texts)}
        return wrap_of(parts, scheduled, facts, f"no part changes less than threshold = {delta:g} in a step; raise it")


def _where(rows: Sequence[Sequence[bool]], texts: Mapping[str, str]) -> list[list[bool]]:
    return [[again and f"{e}/{s}" in texts for s, again in enumerate(row)] for e, row in enumerate(rows)]


def _sums(changes: Sequence[float | None], reused: Sequence[bool]) -> list[float]:
    """Accumulated change at each reused step."""
    out, total = [], 0.0
    for change, again in zip(changes, reused, strict=True):
        total = total + (change or 0.0) if again else 0.0
        if again:
            out.append(total)
    return out
