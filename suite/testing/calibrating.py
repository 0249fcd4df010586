"""`CacheProblem` over the kit's tiny network, so that a calibration can be tried in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond, Denoiser
from suite.fitting.cache_file import CacheFile
from suite.fitting.cache_fit import CacheMethod, patched
from suite.fitting.calibration import Record
from suite.fitting.stamp import RunStamp, digest
from suite.testing.tiny import Tiny
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from suite.network.patch import Patches


@dataclass
class TinyProblem:
    """The samples of `Tiny` with seeds 0, 1, ...; the last `checks` are held out."""

    tiny: Tiny = field(default_factory=Tiny.build)
    samples: int = 4
    checks: int = 2

    def __post_init__(self) -> None:
        self.network, self.run = self.tiny.network, self.tiny.run()
        self.times: list[float] = torch.linspace(1, 0, self.tiny.steps + 1, dtype=torch.float64).tolist()

    def _seeds(self, held_out: bool) -> range:
        return range(self.samples, self.samples + self.checks) if held_out else range(self.samples)

    def sample(
        self, title: str, install: Callable[[Patches], None] | None = None, held_out: bool = False
    ) -> list[Tensor]:
        """See `suite.fitting.cache_fit.CacheProblem`."""
        del title
        with patched(install):
            return [self.tiny.generate(self._seeds(held_out)).x0]

    def records(self, title: str, held_out: bool = False) -> list[list[Record]]:
        """See `suite.fitting.cache_fit.CacheProblem`."""
        del title
        records: list[Record] = []

        class Recorder:
            def __init__(self, inner: Denoiser) -> None:
                self.inner = inner

            def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
                with torch.inference_mode(False):
                    records.append(Record(x.clone(), t.clone(), {k: v.clone() for k, v in cond.items()}, call))
                return self.inner.denoise(x, t, cond, call)

        wrap = Wrap(report=lambda: WrapReport(0, "", reason="records only"), denoiser=Recorder)
        self.tiny.generate(self._seeds(held_out), wrap)
        return [records]

    def answer(self, record: Record) -> Tensor:
        """See `suite.fitting.cache_fit.CacheProblem`."""
        return self.tiny.denoiser().denoise(record.x, record.t, record.cond, record.call)


def calibrated(name: str, method: CacheMethod, problem: Any = None) -> CacheFile:
    """The calibration of a cache to the tiny network, as the command would write it."""
    problem = problem or TinyProblem()
    measured = method.fit(problem)
    stamp = RunStamp("tiny", digest(None), "euler", len(problem.times) - 1, "uniform", "")
    return CacheFile(name, stamp, tuple(problem.times), measured.values, dict(measured.facts))
