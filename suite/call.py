"""`Call`: what the engine tells everyone about one evaluation of the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil

JOIN = "+"


@dataclass(frozen=True, slots=True)
class Call:
    """One evaluation of the denoiser, as the engine sees it.

    Attributes:
        step: index of the solver step, 0 .. steps-1.
        steps: number of solver steps of the run.
        t: time of this evaluation (a float; per-frame times give their maximum).
        next_t: time at which the step ends.
        evaluation: index of the evaluation inside the step (0 for the first).
        branch: guidance branch, `cond`, `uncond` or `ref`; several that travel as one batch are joined
            by `+` and lie one after the other along the batch axis.
        run_id: identifies the run; a new run has a new id.
        share: of the batch's rows that are asked for; below 1 where one evaluation is split into several calls,
            whose shares add up to 1, or where the other rows need none. It counts as so much of an evaluation. Joined
            branches may then have different numbers of rows: who splits a batch by branches must ask for all rows.
        together: all branches that guidance evaluates at this time, joined by `+`, of which `branch` are those of this
            call; empty where nobody said.
    """

    step: int
    steps: int
    t: float
    next_t: float
    evaluation: int = 0
    branch: str = "cond"
    run_id: str = ""
    share: float = 1.0
    together: str = ""

    @property
    def key(self) -> str:
        """Name of these branches for state that is kept between calls.

        It differs where others are evaluated with them and where not, so that a branch that travels alone, on a rank
        or in a call of its own, is kept for exactly as long as the joined batch would be.
        """
        return self.branch if self.together in ("", self.branch) else f"{self.branch} of {self.together}"

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of this call in batch order."""
        return tuple(self.branch.split(JOIN))

    def on(self, *branches: str, together: str = "") -> Call:
        """The same evaluation for other branches; `together` as it was unless it is given."""
        # Spelt out: dataclasses.replace costs ten times as much, at every evaluation.
        branch, together = JOIN.join(branches), together or self.together
        return Call(
            self.step, self.steps, self.t, self.next_t, self.evaluation, branch, self.run_id, self.share, together
        )


def first_steps(share: float, steps: int) -> int:
    """How many of a run's steps its first `share` is, rounded up: everyone who splits a run splits it alike."""
    return ceil(share * steps - 1e-9)  # 0.3 of 10 is 3, whatever its last bit says


_active: ContextVar[Call] = ContextVar("suite_active_call")
_rows: ContextVar[int] = ContextVar("suite_active_rows", default=0)


@contextmanager
def activate(call: Call, rows: int = 0) -> Iterator[None]:
    """Make `call` the active one while the network runs on so many rows, so that wraps of its blocks can ask."""
    token, token_of_rows = _active.set(call), _rows.set(rows)
    try:
        yield
    finally:
        _active.reset(token)
        _rows.reset(token_of_rows)


def active_call() -> Call:
    """The call in which the network is running now.

    Raises:
        LookupError: outside of an evaluation by the engine.
    """
    call = _active.get(None)
    if call is None:
        raise LookupError(
            "no evaluation is running: a block wrap was called outside of the engine; "
            "call the network through the engine's denoiser, or use `suite.call.activate(call)`"
        )
    return call


def active_rows() -> int:
    """Rows of the batch that the network was given: samples times branches. 0 outside of an evaluation by the engine.

    A block may see more rows than that: blocks over space have a row for each frame of a sample, blocks over time one
    for each place, sample after sample.
    """
    return _rows.get()
