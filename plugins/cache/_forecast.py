"""Forecasts of a quantity from its values at earlier times: weights of the values, and what is kept of them.

Every form is linear in the values, so a forecast is a weighted sum whose weights come from the times alone. Times
are those of the run, not step counts: on an uneven grid equal numbers of steps are unequal distances.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from suite.plugins.cache._shared import size

RUNS, RUN = 16, 16
"""Of an output, so many runs of so many numbers tell how far a forecast is off."""

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call

    Form = Literal["taylor", "adams", "hermite"]


def weights(form: Form, nodes: Sequence[float], t: float, scale: float = 0.5) -> list[float]:
    """How much each value counts in the forecast for time t.

    With n = nodes[0] the newest time, D^k the k-th nested backward difference quotient there and x = t - n:

    - `taylor`: sum_k D^k x^k / k!, TaylorSeer's form (2503.06923, Eq. 6). Difference quotients are derivatives at n
      to first order only, so its error falls with the square of the step however many values it has.
    - `adams`: the polynomial through all values, which Adams-Bashforth methods integrate; on even times its weights
      are AB-Cache's binomials (2504.10540). With m + 1 values it is exact for polynomials of degree m.
    - `hermite`: sum_k D^k g^k H_k(x/g) / k! with g the last gap, H_k(u) = scale^k He_k(scale u) and He_k the
      physicists' Hermite polynomials: HiCache (2508.16984). It damps: with a scale below sqrt(1/2) the first
      derivative counts 2 scale^2 < 1 times.

    Args:
        form: see above.
        nodes: times of the values, newest first, all different.
        t: the time to forecast for.
        scale: of `hermite`.

    Returns:
        One weight a node; they sum to 1.
    """
    if len(nodes) == 1:
        return [1.0]
    if form == "adams":
        return [
            math.prod((t - b) / (a - b) for j, b in enumerate(nodes) if j != i) for i, a in enumerate(nodes)
        ]  # Lagrange
    x, gap = t - nodes[0], abs(nodes[0] - nodes[1])
    out, power = [0.0] * len(nodes), 1.0
    for order, quotient in enumerate(_quotients(nodes)):
        term = power if form == "taylor" else power * _hermite(order, x / gap, scale)
        for i, value in enumerate(quotient):
            out[i] += value * term / math.factorial(order)
        # By multiplication: torch.compile traces times as symbols, and has no power 0 of these.
        power *= x if form == "taylor" else gap
    return out


def _quotients(nodes: Sequence[float]) -> list[list[float]]:
    """The nested backward difference quotients at nodes[0], each as weights of the values.

    D^k at a node is the difference of D^(k-1) there and at the node before, over the time between these two.
    """
    count = len(nodes)
    level = [[float(i == j) for j in range(count)] for i in range(count)]
    out = [level[0]]
    for _ in range(1, count):
        level = [
            [(a - b) / (nodes[i] - nodes[i + 1]) for a, b in zip(level[i], level[i + 1], strict=True)]
            for i in range(len(level) - 1)
        ]
        out.append(level[0])
    return out


def _hermite(order: int, u: float, scale: float) -> float:
    """scale^k H_k(scale u), physicists' H."""
    previous, now = 0.0, 1.0
    for k in range(order):
        previous, now = now, 2 * scale * u * now - 2 * k * previous
    return scale**order * now


def blend(coefficients: Sequence[float], outputs: Sequence[Any]) -> Any:
    """The weighted sum of outputs of one structure: tensors, None, or tuples of outputs.

    Sums are at least float32. A single output with weight 1 is returned as it is.
    """
    first = outputs[0]
    if len(outputs) == 1 or first is None:
        return first
    if isinstance(first, tuple | list):
        return type(first)(blend(coefficients, parts) for parts in zip(*outputs, strict=True))
    import torch

    dtype = torch.promote_types(first.dtype, torch.float32)
    out = first.to(dtype) * coefficients[0]
    for weight, value in zip(coefficients[1:], outputs[1:], strict=True):
        out.add_(value.to(dtype), alpha=weight)
    return out.to(first.dtype)


class Check(NamedTuple):
    """Some numbers of an output that was computed though it could have been forecast, and of its forecast's sources."""

    form: Form
    scale: float
    times: tuple[float, ...]
    t: float
    known: list[Tensor]
    wanted: Tensor

    def error(self) -> float:
        """mean|forecast - output| / mean|output|. The arithmetic is done here, in the report, not while sampling."""
        got = blend(weights(self.form, self.times, self.t, self.scale), self.known)
        return float((got - self.wanted).abs().float().mean() / self.wanted.abs().float().mean())


class Kept(NamedTuple):
    """A computed output: when, what, and its bytes."""

    step: int
    t: float
    output: Any
    bytes: int


@dataclass
class History:
    """The last computed outputs of one part, one branch and one evaluation, newest first.

    Attributes:
        order: degree of the forecast; order + 1 outputs are kept.
        interval: outputs further apart than this many steps have nothing in common.
        newest: step of the newest output; -1 when there is none.
    """

    order: int
    interval: int
    form: Form
    scale: float
    kept: deque[Kept] = field(default_factory=deque)
    newest: int = -1
    bytes: int = 0

    def push(self, call: Call, output: Any) -> None:
        """Add an output; what is too old, or of another shape, goes."""
        kept = self.kept
        # Every part of a network passes through here: the common case, two tensors, is looked at first.
        shape = getattr(output, "shape", None)
        if kept:
            last = kept[0]
            near = 0 < call.step - last.step <= self.interval and call.t != last.t
            alike = shape is not None and shape == getattr(last.output, "shape", None)
            if not (near and (alike or _alike(last.output, output))):
                self.clear()
            elif len(kept) > self.order:
                self.bytes -= kept.pop().bytes
        count = size(output) if shape is None else output.nbytes
        kept.appendleft(Kept(call.step, call.t, output, count))
        self.newest = call.step
        self.bytes += count

    def at(self, t: float) -> Any:
        """The forecast for time t from all that is kept."""
        return blend(weights(self.form, [k.t for k in self.kept], t, self.scale), [k.output for k in self.kept])

    def clear(self) -> None:
        """Forget everything."""
        self.kept.clear()
        self.newest, self.bytes = -1, 0

    def missed(self, call: Call, output: Any) -> Check | None:
        """What a forecast for this call would have to be held against; see `mean_error`.

        None where no whole interval lies between. What is done here is done while sampling, so it is little.
        """
        if self.newest < 0 or call.step - self.newest != self.interval or not _alike(self.kept[0].output, output):
            return None
        wanted = _sampled(output)
        if wanted is None:
            return None
        known = [_sampled(k.output) for k in self.kept]
        return Check(self.form, self.scale, tuple(k.t for k in self.kept), call.t, known, wanted)


def mean_error(checks: Sequence[Check]) -> float | None:
    """Mean over forecasts of their relative error; None of none."""
    return sum(check.error() for check in checks) / len(checks) if checks else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two outputs have the same structure and shapes."""
    if isinstance(a, tuple | list) or isinstance(b, tuple | list):
        same = isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b)
        return same and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return (None if a is None else a.shape) == (None if b is None else b.shape)


def _sampled(output: Any) -> Any:
    """A copy of some numbers of the first tensor, in runs that are spread evenly."""
    while isinstance(output, tuple | list):
        output = next((o for o in output if o is not None), None)
    if output is None:
        return None
    flat = output.reshape(-1)
    runs = max(1, min(RUNS, len(flat) // RUN))
    # Neighbours come from memory together: runs of them cost a sixteenth of as many numbers far apart.
    length, apart = min(RUN, len(flat)), len(flat) // runs
    return flat.as_strided((runs, length), (apart, 1), flat.storage_offset()).clone()
