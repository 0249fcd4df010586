"""What `nirvana` and `redi` have in common: stamps, and a solver that shows the states it passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver, SolverFacts
from suite.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.rng import SampleRng
    from suite.diffusion.sampler import Problem
    from suite.plugins.cache._store import Store
    from suite.run import Run


def stamp_of(problem: Problem) -> str:
    """What states of this problem are good for: the run's stamp, its grid, and the shape of a sample."""
    run = problem.run
    facts = [
        run.stamp, run.modality, run.model, run.device, run.dtype, run.guidance, list(run.guidance_interval),
        type(problem.solver).__qualname__, str(problem.solver), problem.times.tolist(), list(problem.x.shape[1:]),
        sorted((k, str(v)) for k, v in run.facts.items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def check_fits(name: str, problem: Problem, store: Store, copies: int) -> None:
    """Refuse, before anything is evaluated, what can never be stored or resumed.

    Raises:
        ConfigError: a solver without a grid, or states larger than the store.
    """
    if isinstance(problem.solver, AdaptiveSolver):
        raise ConfigError(
            f"{name} stores states at steps of the grid, but the solver picks its own times; name another"
        )
    one = problem.x[:1].numel() * problem.x.element_size() * copies
    if one > store.limit:
        raise ConfigError(
            f"{name}: a state has {one / 2**20:.3g} MiB, and limit_mib = {store.limit / 2**20:.3g}; raise it, or drop "
            f"--cache {name}"
        )


@dataclass(frozen=True)
class Showing(Solver):
    """A solver that hands on its states: `show(k, x, rng)` after k of the grid's steps, for the k that are wanted."""

    inner: Solver
    wanted: Collection[int]
    show: Callable[[int, Tensor, SampleRng], None]
    before: int = 0

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.facts

    def begin(self, run: Run, times: Tensor) -> Any:
        return self.before, self.inner.begin(run, times)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        done, inner = state
        x, inner = self.inner.step(denoise, x, t, s, inner, rng)
        if done + 1 in self.wanted:
            self.show(done + 1, x, rng)
        return x, (done + 1, inner)

    def evaluations(self, steps: int) -> int:
        return self.inner.evaluations(steps)
