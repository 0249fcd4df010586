"""What TeaCache wants to know: how the change of its signal foretells the change of what the blocks add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from suite.errors import ConfigError
from suite.fitting.cache_fit import CacheMethod, CacheProblem, Measured
from suite.network.chain import row_means
from suite.plugins.cache._residual import Residual

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.network.chain import States


@dataclass
class Watch:
    """Computes everything, and notes both changes of every row from step to step.

    Attributes:
        pairs: (change of the signal, change of the residual), relative.
    """

    watches: bool = True
    pairs: list[tuple[float, float]] = field(default_factory=list)
    before: dict[tuple[str, int], tuple[int, Tensor, States]] = field(default_factory=dict)
    signal: Tensor | None = None

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        del call
        self.signal = signal
        return list(range(batch))

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        del rows
        assert self.signal is not None
        key = (call.key, call.evaluation)
        step, signal, old = self.before.get(key, (-2, self.signal, residual))
        if step == call.step - 1:
            x = row_means(self.signal - signal) / row_means(signal)
            pairs = [(a, b) for a, b in zip(old, residual, strict=True) if a is not None and b is not None]
            away, size = (sum(row_means(v(a, b)) for a, b in pairs) for v in (lambda a, b: b - a, lambda a, b: a))
            self.pairs += zip(x.tolist(), (away / size).tolist(), strict=True)  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
        self.before[key] = (call.step, self.signal, residual)

    def recall(self, call: Call) -> States:
        raise AssertionError("every row is computed")


def determination(predicted: list[float], seen: list[float]) -> float:
    """R^2: 1 minus the squared error over the variance."""
    mean = sum(seen) / len(seen)
    spread = sum((y - mean) ** 2 for y in seen)
    return 1 - sum((p - y) ** 2 for p, y in zip(predicted, seen, strict=True)) / spread if spread else 0.0


@dataclass(frozen=True)
class TeaCache(CacheMethod):
    """A polynomial by least squares over all steps, branches and samples; its R^2 is that of the held-out ones.

    Args:
        degree: of the polynomial; the paper's is 4.
        min_r2: a poorer fit is refused.
    """

    degree: int = 4
    min_r2: float = 0.5

    summary: ClassVar[str] = "a polynomial from the change of the modulated input to that of the residual"
    paper: ClassVar[str] = "TeaCache (2411.19108), section 3.3"

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= 8:
            raise ConfigError(f"teacache: degree = {self.degree}: expected 1 to 8, e.g. teacache:degree=4")
        if not self.min_r2 <= 1:
            raise ConfigError(f"teacache: min_r2 = {self.min_r2}: expected at most 1, e.g. teacache:min_r2=0.5")

    def fit(self, problem: CacheProblem) -> Measured:
        import numpy as np

        from suite.plugins.cache.teacache import Rescaling

        seen: list[list[tuple[float, float]]] = []
        for title, held_out in (("changes", False), ("check", True)):
            watch = Watch()
            problem.sample(title, Residual.of(problem.network, "teacache", watch).install, held_out)
            seen.append(watch.pairs)
        fitted, checked = seen
        if len(fitted) <= self.degree:
            raise ConfigError(f"teacache: {len(fitted)} changes are too few for degree {self.degree}; take more steps")
        x, y = (np.array(v) for v in zip(*fitted, strict=True))
        powers = np.vander(x / x.max(), self.degree + 1, increasing=True)
        solution = np.linalg.lstsq(powers, y, rcond=None)[0] / x.max() ** np.arange(self.degree + 1)
        rescale = Rescaling(tuple(solution.tolist()), float(x.min()), float(x.max()))
        r2 = determination([rescale(a) for a, _ in checked], [b for _, b in checked])
        if not r2 >= self.min_r2:
            raise ConfigError(
                f"teacache: the polynomial explains R2 = {r2:.3f} of the held-out changes, less than min_r2 = "
                f"{self.min_r2:g}: the signal does not foretell this model's output; take more --samples, another "
                "degree, or another cache"
            )
        facts = {"r2": r2, "pairs": len(fitted), "held_out_pairs": len(checked)}
        return Measured({"coefficients": list(rescale.coefficients), "range": [rescale.low, rescale.high]}, facts)
