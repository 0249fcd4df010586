"""Checks of the hook `parallelize` on two ranks, which are threads."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.mesh import Mesh
from suite.testing.checks.subject import LOSSLESS_FACTOR, Subject, of
from suite.testing.checks.wrap import tiny_of
from suite.testing.tiny import Outcome


class _RanksDiffer(Exception):
    """A rank waits for a collective that another one has finished without."""


class _Meeting:
    """Where threads that play ranks exchange tensors; it never hangs."""

    def __init__(self, size: int) -> None:
        self.left: list[Tensor | None] = [None] * size
        self._arrivals = [0] * size
        self._gone = [False] * size
        self._changed = threading.Condition()

    def wait(self, rank: int) -> None:
        """Until every rank has come as often as this one; _RanksDiffer if one never will."""
        with self._changed:
            self._arrivals[rank] += 1
            mine = self._arrivals[rank]
            self._changed.notify_all()

            def missing() -> list[bool]:
                return [gone for gone, n in zip(self._gone, self._arrivals, strict=True) if n < mine]

            self._changed.wait_for(lambda: not missing() or any(missing()))
            if missing():
                raise _RanksDiffer

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone[rank] = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _ThreadMesh(Mesh):
    """One rank of a mesh whose ranks are threads of this process: collectives without a process group."""

    meeting: _Meeting = dataclasses.field(kw_only=True, compare=False)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.meeting.left[self.rank] = x
        self.barrier()
        parts = [part.clone() for part in self.meeting.left if part is not None]
        self.barrier()
        return parts

    def barrier(self) -> None:
        self.meeting.wait(self.rank)


def _on_ranks(subject: Subject, hook: str, size: int = 2) -> list[Outcome]:
    """The outcome of each rank; ranks that wait for different collectives are an error, not a hang."""
    meeting = _Meeting(size)

    def rank(index: int) -> Outcome:
        try:
            tiny = tiny_of(subject).copy()
            run = tiny.run((0, 1), world=size)
            mesh = _ThreadMesh(index, size, meeting=meeting)
            return tiny.generate((0, 1), tiny.wrap(subject.manager(hook), hook, run, mesh), run=run)
        finally:
            meeting.leave(index)

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(rank, index) for index in range(size)]
    errors = [e for r in ranks if (e := r.exception()) is not None]
    # That a rank waits in vain is only the echo of another rank's error, if there is one.
    for error in sorted(errors, key=lambda e: isinstance(e, _RanksDiffer)):
        if isinstance(error, _RanksDiffer):
            raise AssertionError("the ranks wait for different collectives") from error
        raise error
    return [r.result() for r in ranks]


@of("parallelize")
def check_parallelize_two_ranks(subject: Subject) -> None:
    """Two ranks agree bit for bit; a lossless plugin gives what one process gives, and any says what it did."""
    one, two = _on_ranks(subject, "parallelize")
    assert torch.equal(one.x0, two.x0), f"the ranks differ by {float((one.x0 - two.x0).abs().max()):.2g}"
    for outcome in (one, two):
        assert outcome.report is None or outcome.report.did > 0 or outcome.report.reason, "it gives no `reason`"
    # One process may send its branches as one batch or apart; both are plain.
    plain = [tiny_of(subject).generate((0, 1), batched=batched).x0 for batched in (True, False)]
    assert one.x0.shape == plain[0].shape and one.x0.dtype is plain[0].dtype, "shape or dtype is not kept"
    assert one.x0.isfinite().all(), "x0 is not finite"
    if not subject.plugin.lossless or any(torch.equal(one.x0, p) for p in plain):
        return
    exact = tiny_of(subject).to(torch.float64).generate((0, 1)).x0
    error, baseline = (float((x - exact).abs().max()) for x in (one.x0, plain[0]))
    assert error <= LOSSLESS_FACTOR * baseline, (
        f"it claims `lossless`, but its error against float64 is {error:.2g}; one process's is {baseline:.2g}"
    )
