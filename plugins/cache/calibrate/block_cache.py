"""What Block Caching wants to know: how each part changes from step to step, and how to scale what is reused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import active_call
from suite.errors import ConfigError
from suite.fitting.cache_fit import CacheMethod, CacheProblem, Measured
from suite.network.described import found
from suite.plugins.cache._scheduled import KINDS, computed_before, leaves
from suite.plugins.cache.block_cache import Affine, encoded, reuse

if TYPE_CHECKING:
    from torch import Tensor

    from suite.network import Network
    from suite.network.patch import Patches

#: Steps apart, or of another branch: nothing to compare with.
Key = tuple[str, int, int]


@dataclass
class Changes:
    """Notes how much the output of every part differs from that at the step before, relative to its own size.

    Attributes:
        seen: (part, evaluation, step) -> |new - old| / |new| of every row, L1.
    """

    network: Network
    seen: dict[Key, list[float]] = field(default_factory=dict)
    before: dict[tuple[str, str, int], tuple[int, list[Tensor]]] = field(default_factory=dict)

    def install(self, patches: Patches) -> None:
        for ref in self.network.blocks(*KINDS):
            patches.replace(ref.module, lambda forward, name=ref.name: self._watch(name, forward))

    def _watch(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            call, output = active_call(), forward(*args, **kwargs)
            now, key = leaves(output), (name, call.key, call.evaluation)
            step, old = self.before.get(key, (-2, now))
            if step == call.step - 1:
                away, size = (sum(_rows(v(a, b)) for a, b in zip(old, now, strict=True)) for v in (_away, _last))
                self.seen.setdefault((name, call.evaluation, call.step), []).extend((away / size).tolist())  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
            self.before[key] = (call.step, now)
            return output

        return watched

    def tables(self, steps: int) -> dict[str, list[list[float | None]]]:
        """Part -> evaluations x steps mean changes; None where nothing was measured."""
        evaluations = 1 + max((e for _, e, _ in self.seen), default=0)

        def mean(values: list[float] | None) -> float | None:
            return round(sum(values) / len(values), 6) if values else None

        return {
            ref.name: [[mean(self.seen.get((ref.name, e, s))) for s in range(steps)] for e in range(evaluations)]
            for ref in self.network.blocks(*KINDS)
        }


def _away(a: Tensor, b: Tensor) -> Tensor:
    return b - a


def _last(a: Tensor, b: Tensor) -> Tensor:
    del a
    return b


def _rows(x: Tensor) -> Tensor:
    return x.abs().float().flatten(1).sum(1)


@dataclass
class Moments:
    """Per channel, over rows and tokens: count, and sums of c, y, c c, c y, y y; c is kept, y is the plain output."""

    sums: Tensor
    count: int = 0

    def add(self, kept: Tensor, plain: Tensor) -> None:
        c, y = (v.double().flatten(0, -2) for v in (kept, plain))
        for index, term in enumerate((c, y, c * c, c * y, y * y)):
            self.sums[index] += term.sum(0)
        self.count += c.shape[0]

    def affine(self) -> Affine:
        """(scale, shift) with the least squared error of scale c + shift against y."""
        import torch

        c, y, cc, cy, _ = self.sums / self.count
        variance = cc - c * c
        scale = torch.where(variance > 1e-12 * cc.clamp_min(1e-30), (cy - c * y) / variance, torch.ones_like(c))
        return scale.tolist(), (y - scale * c).tolist()

    def errors(self, affine: Affine) -> tuple[float, float, float]:
        """Sums of squares: of y - c, of y - scale c - shift, and of y."""
        import torch

        scale, shift = (torch.tensor(v, dtype=torch.float64, device=self.sums.device) for v in affine)
        c, y, cc, cy, yy = self.sums
        adjusted = yy + scale**2 * cc + shift**2 * self.count - 2 * scale * cy - 2 * shift * y + 2 * scale * shift * c
        return float((yy - 2 * cy + cc).sum()), float(adjusted.sum()), float(yy.sum())


@dataclass
class Pairs:
    """Computes everything; at steps that the plan reuses, compares with what would have been reused."""

    network: Network
    plan: dict[str, list[list[bool]]]
    moments: dict[Key, list[Moments]] = field(default_factory=dict)
    kept: dict[tuple[str, str, int], tuple[int, list[Tensor]]] = field(default_factory=dict)

    def install(self, patches: Patches) -> None:
        """Watch every part."""
        for ref in self.network.blocks(*KINDS):
            patches.replace(ref.module, lambda forward, name=ref.name: self._watch(name, forward))

    def _watch(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def watched(*args: Any, **kwargs: Any) -> Any:
            call, output = active_call(), forward(*args, **kwargs)
            key, row = (name, call.key, call.evaluation), self.plan[name][call.evaluation]
            if not row[call.step]:
                self.kept[key] = (call.step, leaves(output))
            elif key in self.kept and self.kept[key][0] == computed_before(row, call.step):
                now = leaves(output)
                here = (name, call.evaluation, call.step)
                if here not in self.moments:
                    self.moments[here] = [Moments(torch.zeros(5, t.shape[-1], dtype=torch.float64)) for t in now]
                for moments, c, y in zip(self.moments[here], self.kept[key][1], now, strict=True):
                    moments.add(c.cpu(), y.cpu())
            return output

        return watched


@dataclass(frozen=True)
class BlockCache(CacheMethod):
    """Changes from plain runs; scales and shifts by least squares, which is the minimiser of the paper's distillation
    of every part on the teacher's own inputs, in closed form.

    Args:
        threshold: delta that the scales and shifts are fitted to, and that the file means by default.
        adjust: fit them; without, the file is small and serves every delta.
    """

    threshold: float = 0.2
    adjust: bool = True

    summary: ClassVar[str] = "the change of every attention and MLP from step to step; scales and shifts"
    paper: ClassVar[str] = "Block Caching (2312.03209), sections 3.2 and 3.3"

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ConfigError(
                f"block-cache: threshold = {self.threshold}: expected more than 0, e.g. block-cache:threshold=0.2"
            )

    def fit(self, problem: CacheProblem) -> Measured:
        network, steps = problem.network, len(problem.times) - 1
        if not network.blocks(*KINDS):
            raise ConfigError(f"block-cache looked for {', '.join(KINDS)}, but {found(network)}")
        changes = Changes(network)
        problem.sample("changes", changes.install)
        tables = changes.tables(steps)
        plan = {part: [reuse(row, self.threshold) for row in rows] for part, rows in tables.items()}
        flags = [again for rows in plan.values() for row in rows for again in row]
        facts: dict[str, Any] = {"reused_share": sum(flags) / len(flags)}
        values: dict[str, Any] = {"threshold": self.threshold, "changes": tables}
        if self.adjust:
            if not any(flags):
                raise ConfigError(
                    f"block-cache: no part changes less than threshold = {self.threshold:g} in a step; take a larger"
                )
            fitted, checked = Pairs(network, plan), Pairs(network, plan)
            problem.sample("scales", fitted.install)
            problem.sample("check", checked.install, held_out=True)
            affines = {key: [m.affine() for m in moments] for key, moments in fitted.moments.items()}
            errors = [
                m.errors(affine)
                for key, moments in checked.moments.items()
                for m, affine in zip(moments, affines[key], strict=True)
            ]
            plain, adjusted, size = (sum(e[k] for e in errors) for k in range(3))
            facts |= {"error_reused": (plain / size) ** 0.5, "error_adjusted": (adjusted / size) ** 0.5}
            if adjusted > plain:
                raise ConfigError(
                    "block-cache: scales and shifts make held-out outputs worse, "
                    f"{facts['error_adjusted']:.3g} instead of {facts['error_reused']:.3g}; take more --samples, or "
                    "block-cache:adjust=false"
                )
            texts: dict[str, dict[str, str]] = {}
            for (part, evaluation, step), affine in affines.items():
                texts.setdefault(part, {})[f"{evaluation}/{step}"] = encoded(affine)
            values["adjust"] = texts
        return Measured(values, facts)
