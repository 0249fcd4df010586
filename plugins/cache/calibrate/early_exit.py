"""Depths for early exit with a guarantee: how many blocks are enough for most samples, by conformal calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.errors import ConfigError
from suite.fitting.cache_fit import CacheMethod, CacheProblem, Measured, patched
from suite.network.chain import chain_of
from suite.plugins.cache.early_exit import Exit

if TYPE_CHECKING:
    from suite.fitting.calibration import Record
    from suite.network.patch import Patches


def conformal(scores: Sequence[float], epsilon: float) -> float:
    """The value that a further exchangeable score does not exceed with probability at least 1 - epsilon.

    The k-th smallest of n scores with k = ceil((n + 1)(1 - epsilon)); infinite if k > n: too few scores.
    """
    rank = math.ceil((len(scores) + 1) * (1 - epsilon) - 1e-9)
    return sorted(scores)[max(0, rank - 1)] if rank <= len(scores) else math.inf


def consistent(errors: Sequence[float], tolerance: float) -> int:
    """The least depth from which on all errors are within the tolerance; errors[d - 1] is that of depth d."""
    depth = len(errors)
    while depth > 1 and errors[depth - 2] <= tolerance:
        depth -= 1
    return depth


@dataclass(frozen=True)
class EarlyExit(CacheMethod):
    """For every step the depth with which a further sample's answers are within the tolerance of the full network's,
    with probability at least 1 - epsilon, on inputs of plain runs.

    A sample's score at a step is the least depth from which on the answers of all its branches are within the
    tolerance, root mean square relative; the depth is the scores' conformal quantile. Below 1 / epsilon - 1 samples it
    is the full one.

    Args:
        epsilon: largest share of samples that may be further off.
        tolerance: largest relative error of x0 in one call.
    """

    epsilon: float = 0.1
    tolerance: float = 0.05

    summary: ClassVar[str] = "how many blocks are enough at every step, by conformal calibration"
    paper: ClassVar[str] = "CATs (2104.08803), section 4; ASE (Moon 2024)"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"early-exit: epsilon = {self.epsilon}: expected more than 0 and less than 1, e.g. 0.1")
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise ConfigError(f"early-exit: tolerance = {self.tolerance}: expected more than 0, e.g. 0.05")

    def fit(self, problem: CacheProblem) -> Measured:
        blocks, steps = len(chain_of(problem.network, "early-exit")), len(problem.times) - 1
        fitted, checked = (self._scores(problem, title, blocks, held_out) for title, held_out in _STAGES)
        count = max(len(scores) for scores in fitted.values())
        if conformal([1.0] * count, self.epsilon) == math.inf:
            raise ConfigError(
                f"early-exit: {count} samples say nothing about epsilon = {self.epsilon:g}; take --samples "
                f"{math.ceil(1 / self.epsilon) - 1} or more"
            )
        evaluations = 1 + max(evaluation for evaluation, _ in fitted)
        depths: list[list[int | None]] = [[None] * steps for _ in range(evaluations)]
        for (evaluation, step), scores in fitted.items():
            depths[evaluation][step] = int(min(blocks, conformal(scores, self.epsilon)))
        within = [
            score <= depth
            for (evaluation, step), scores in checked.items()
            for score in scores
            if (depth := depths[evaluation][step]) is not None
        ]
        known = [d for row in depths for d in row if d is not None]
        facts = {"mean_depth": sum(known) / len(known), "blocks": blocks, "coverage": sum(within) / len(within)}
        return Measured({"depths": depths, "blocks": blocks}, facts)

    def _scores(
        self, problem: CacheProblem, title: str, blocks: int, held_out: bool
    ) -> dict[tuple[int, int], list[float]]:
        """(evaluation, step) -> a score for each sample."""
        scores: dict[tuple[int, int], list[float]] = {}
        for records in problem.records(title, held_out):
            of_batch: dict[tuple[int, int], list[float]] = {}
            for record in records:
                key, each = (record.call.evaluation, record.call.step), self._rows(problem, record, blocks)
                before = of_batch.setdefault(key, [1.0] * len(each))
                of_batch[key] = [max(a, b) for a, b in zip(before, each, strict=True)]
            for key, values in of_batch.items():
                scores.setdefault(key, []).extend(values)
        return scores

    def _rows(self, problem: CacheProblem, record: Record, blocks: int) -> list[float]:
        """Scores of the samples of one record, the largest of its branches."""
        import torch

        def install(depth: int, patches: Patches) -> None:
            refs = chain_of(problem.network, "early-exit")
            chain = Exit(refs, lambda call: depth)
            for index, ref in enumerate(refs):
                patches.replace(ref.module, lambda forward, index=index: chain.block(index, forward))

        with torch.inference_mode():
            full, errors = problem.answer(record), []
            size = full.square().flatten(1).mean(1).sqrt()
            for depth in range(1, blocks):
                with patched(lambda patches, depth=depth: install(depth, patches)):
                    away = (problem.answer(record) - full).square().flatten(1).mean(1).sqrt()
                errors.append((away / size).tolist())
        errors.append([0.0] * full.shape[0])
        rows = [float(consistent([e[row] for e in errors], self.tolerance)) for row in range(full.shape[0])]
        samples = len(rows) // len(record.call.branches)  # branches lie one after the other along the batch
        return [max(rows[sample::samples]) for sample in range(samples)]


_STAGES = (("depths", False), ("check", True))
