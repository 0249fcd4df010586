"""What MagCache wants to know: how the magnitude of what the blocks add changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from suite.errors import ConfigError
from suite.fitting.cache_fit import CacheMethod, CacheProblem, Measured
from suite.plugins.cache._residual import Residual

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.network.chain import States


@dataclass
class Watch:
    """Computes everything, and notes the ratio of every row at every step.

    Attributes:
        ratios: (evaluation, step) -> a ratio a row: the mean over tokens of |r| / |r before|, Euclidean over channels.
    """

    watches: bool = False
    ratios: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    before: dict[tuple[str, int], tuple[int, States]] = field(default_factory=dict)

    def missing(self, call: Call, batch: int, signal: Tensor | None) -> list[int]:
        del call, signal
        return list(range(batch))

    def keep(self, call: Call, rows: list[int], residual: States) -> None:
        del rows
        key = (call.key, call.evaluation)
        step, old = self.before.get(key, (-2, residual))
        if step == call.step - 1:
            now, then = (next(r for r in reversed(states) if r is not None) for states in (residual, old))
            ratio = now.float().norm(dim=-1) / then.float().norm(dim=-1).clamp_min(1e-12)
            self.ratios.setdefault((call.evaluation, call.step), []).extend(ratio.flatten(1).mean(1).tolist())
        self.before[key] = (call.step, residual)

    def recall(self, call: Call) -> States:
        raise AssertionError("every row is computed")

    def curves(self, steps: int) -> list[list[float | None]]:
        """Means over rows: evaluations x steps; None where nothing was measured. The first step's ratio is 1."""
        out = []
        for evaluation in range(1 + max((e for e, _ in self.ratios), default=0)):
            seen = [self.ratios.get((evaluation, step)) for step in range(steps)]
            curve: list[float | None] = [sum(v) / len(v) if v else None for v in seen]
            first = next((k for k, v in enumerate(curve) if v is not None), 0)
            if first > 0:  # the evaluation before the first ratio was there, and has nothing to be compared with
                curve[first - 1] = 1.0
            out.append(curve)
        return out


@dataclass(frozen=True)
class MagCache(CacheMethod):
    """The mean ratio over tokens, rows and samples; how far the held-out samples are from it is reported.

    Args:
        max_spread: largest root mean square distance of a held-out row's ratio from the curve; a curve that is not
            the same for all prompts is refused.
    """

    max_spread: float = 0.2

    summary: ClassVar[str] = "the ratios of residual magnitudes from step to step"
    paper: ClassVar[str] = "MagCache (2506.09045), section 3.2"

    def __post_init__(self) -> None:
        if not self.max_spread > 0:
            raise ConfigError(f"magcache: max_spread = {self.max_spread}: expected more than 0, e.g. 0.2")

    def fit(self, problem: CacheProblem) -> Measured:
        steps, watches = len(problem.times) - 1, []
        for title, held_out in (("magnitudes", False), ("check", True)):
            watch = Watch()
            problem.sample(title, Residual.of(problem.network, "magcache", watch).install, held_out)
            watches.append(watch)
        curves = watches[0].curves(steps)
        away = [
            (ratio - value) ** 2
            for (evaluation, step), ratios in watches[1].ratios.items()
            for ratio in ratios
            if (value := curves[evaluation][step]) is not None
        ]
        if not away:
            raise ConfigError("magcache: no two steps follow one another; take more steps")
        spread = (sum(away) / len(away)) ** 0.5
        if spread > self.max_spread:
            raise ConfigError(
                f"magcache: the ratios of held-out samples are {spread:.3f} from the curve, more than max_spread = "
                f"{self.max_spread:g}: magnitudes of this model differ from prompt to prompt; take another cache"
            )
        return Measured({"ratios": curves}, {"spread": spread})
