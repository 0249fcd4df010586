"""Routers for Learning-to-Cache: trained on pairs of neighbouring steps of plain runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import active_call
from suite.errors import ConfigError
from suite.fitting.cache_fit import CacheMethod, CacheProblem, Measured, patched
from suite.network.described import found
from suite.plugins.cache._scheduled import KINDS
from suite.plugins.cache.learned import routed

if TYPE_CHECKING:
    from torch import Tensor

    from suite.fitting.calibration import Record
    from suite.network import Network
    from suite.network.patch import Patches


def mixed(beta: Any, full: Any, cached: Any) -> Any:
    """beta full + (1 - beta) cached, for every tensor of an output; at 1 and 0 one of the two, bit for bit."""
    if isinstance(full, tuple | list):
        return type(full)(mixed(beta, f, c) for f, c in zip(full, cached, strict=True))
    return None if full is None else beta * full + (1 - beta) * cached


@dataclass
class Mixing:
    """Patches every part: first it keeps what the part gives, then it mixes what it gives with what was kept.

    Attributes:
        beta: (part, evaluation, step) -> router; a part without one gives what it computes.
    """

    network: Network
    beta: Callable[[str, int, int], Any]
    keeping: bool = True
    kept: dict[str, Any] = field(default_factory=dict)

    def install(self, patches: Patches) -> None:
        for ref in self.network.blocks(*KINDS):
            patches.replace(ref.module, lambda forward, name=ref.name: self._part(name, forward))

    def _part(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def mixing(*args: Any, **kwargs: Any) -> Any:
            output, call = forward(*args, **kwargs), active_call()
            if self.keeping:
                self.kept[name] = output
                return output
            return mixed(self.beta(name, call.evaluation, call.step), output, self.kept[name])

        return mixing


def pairs_of(records: list[Record]) -> list[tuple[Record, Record]]:
    """(the step before, the step) for every odd step, of the same branch and evaluation: only these may reuse."""
    known = {(r.call.step, r.call.key, r.call.evaluation): r for r in records}
    keys = [(k, (k[0] - 1, *k[1:])) for k in known if k[0] % 2 == 1]
    return [(known[before], known[now]) for now, before in keys if before in known]


@dataclass(frozen=True)
class Learned(CacheMethod):
    """One router a part and odd step, by Adam on |x0_mixed - x0|^2 / |x0|^2 + penalty mean(beta).

    Inputs are those of plain runs: the part's output at the even step before is mixed with that at the odd step.
    Reported are errors of x0 in single calls on held-out samples, root mean square relative: of the routers at 0.5, of
    reusing everything.

    Args:
        penalty: price of computing all parts of a step, in relative squared error.
        epochs: passes over all pairs.
        rate: step size of Adam on the logits of beta.
    """

    penalty: float = 0.01
    epochs: int = 10
    rate: float = 0.3

    summary: ClassVar[str] = "trained routers for every attention and MLP at every second step"
    paper: ClassVar[str] = "Learning-to-Cache (2406.01733), section 3.3"

    def __post_init__(self) -> None:
        for name, value in (("penalty", self.penalty), ("rate", self.rate)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"learned: {name} = {value}: expected more than 0, e.g. learned:{name}=0.01")
        if self.epochs < 1:
            raise ConfigError(f"learned: epochs = {self.epochs}: expected at least 1")

    def fit(self, problem: CacheProblem) -> Measured:
        import torch

        network, steps = problem.network, len(problem.times) - 1
        parts = {ref.name: k for k, ref in enumerate(network.blocks(*KINDS))}
        if not parts:
            raise ConfigError(f"learned looked for {', '.join(KINDS)}, but {found(network)}")
        pairs = [p for batch in problem.records("teacher") for p in pairs_of(batch)]
        if not pairs:
            raise ConfigError("learned: no two steps follow one another; take more steps")
        evaluations = 1 + max(now.call.evaluation for _, now in pairs)
        trained = sorted({(now.call.evaluation, now.call.step) for _, now in pairs})
        device = pairs[0][0].x.device
        # Two: a router starts at 0.88, near the plain network.
        logits = torch.full((evaluations, steps, len(parts)), 2.0, device=device, requires_grad=True)
        adam = torch.optim.Adam([logits], lr=self.rate)
        mixing = Mixing(network, lambda name, e, s: logits[e, s, parts[name]].sigmoid())
        order = torch.Generator().manual_seed(0)
        with patched(mixing.install):
            targets = []
            for _, now in pairs:
                mixing.keeping = True
                with torch.no_grad():
                    targets.append(problem.answer(now))
            for _ in range(self.epochs):
                for index in torch.randperm(len(pairs), generator=order).tolist():
                    before, now = pairs[index]
                    error = _error(problem, mixing, before, now, targets[index])
                    price = logits[now.call.evaluation, now.call.step].sigmoid().mean()
                    adam.zero_grad()
                    (logits.grad,) = torch.autograd.grad(error + self.penalty * price, [logits])
                    adam.step()
        beta = logits.detach().sigmoid().double().cpu()
        values = {
            name: [
                [round(float(beta[e, s, k]), 4) if (e, s) in trained else None for s in range(steps)]
                for e in range(evaluations)
            ]
            for name, k in parts.items()
        }
        return Measured({"beta": values}, self._check(problem, network, values))

    def _check(self, problem: CacheProblem, network: Network, values: dict[str, Any]) -> dict[str, Any]:
        """Errors on the held-out samples and the share of part calls that is reused, at a threshold of 0.5."""
        import torch

        plan = {name: [routed(row, 0.5) for row in rows] for name, rows in values.items()}
        rules: dict[str, Callable[[str, int, int], Any]] = {
            "error_routed": lambda name, e, s: 0.0 if plan[name][e][s] else 1.0,
            "error_all_reused": lambda name, e, s: 0.0,
        }
        pairs = [p for batch in problem.records("check", held_out=True) for p in pairs_of(batch)]
        facts: dict[str, Any] = {}
        for name, rule in rules.items():
            mixing, errors = Mixing(network, rule), []
            with torch.no_grad(), patched(mixing.install):
                for before, now in pairs:
                    mixing.keeping = True
                    target = problem.answer(now)
                    errors.append(float(_error(problem, mixing, before, now, target)))
            facts[name] = (sum(errors) / len(errors)) ** 0.5
        flags = [again for rows in plan.values() for row in rows for again in row]
        return facts | {"reused_share": sum(flags) / len(flags)}


def _error(problem: CacheProblem, mixing: Mixing, before: Record, now: Record, target: Tensor) -> Tensor:
    """Squared distance of the mixed answer from the full one, over the latter's square."""
    import torch

    mixing.keeping = True
    with torch.no_grad():
        problem.answer(before)
    mixing.keeping = False
    return (problem.answer(now) - target).square().mean() / target.square().mean()
