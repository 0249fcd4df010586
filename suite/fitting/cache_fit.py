"""Calibrating a cache: the problem that every method gets, and what a method is.

A method is a frozen dataclass of options below `CacheMethod`, registered as an entry point of the group
`suite.calibrations` under the name of the cache that reads its file. Like a plugin's, its module must load without
torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.denoiser import Counter
    from suite.diffusion.sampler import Problem
    from suite.engine.engine import Engine
    from suite.fitting.calibration import Record
    from suite.network import Network
    from suite.network.patch import Patches
    from suite.run import Run

CALIBRATIONS = "suite.calibrations"
"""Entry-point group of the methods."""


@dataclass(frozen=True)
class Measured:
    """What a method found.

    Attributes:
        values: for the file, JSON-able.
        facts: numbers that tell how good they are, JSON-able; printed and kept in the file.
    """

    values: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


class CacheMethod(ABC):
    """A way to calibrate. Class attributes: `summary`, `paper`."""

    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @abstractmethod
    def fit(self, problem: CacheProblem) -> Measured:
        """What the cache wants to know of this model.

        Raises:
            ConfigError: the measurement is too poor to be used; the message says how poor.
        """


class CacheProblem(Protocol):
    """A model with its solver, grid and number of steps, and samples of it to measure.

    Attributes:
        network, run: as the hook `cache` gets them.
        times: [steps + 1] of the run.
    """

    network: Network
    run: Run
    times: list[float]

    def sample(
        self, title: str, install: Callable[[Patches], None] | None = None, held_out: bool = False
    ) -> list[Tensor]:
        """x0 of all samples in batches, with forwards patched by `install` while they are made.

        Args:
            title: for the progress bar.
            install: patches what is to be watched or changed; undone afterwards.
            held_out: the other samples, which nothing may be fitted to.
        """
        ...

    def records(self, title: str, held_out: bool = False) -> list[list[Record]]:
        """The denoiser's inputs below guidance along plain runs; a list for each batch, in order of evaluation."""
        ...

    def answer(self, record: Record) -> Tensor:
        """The denoiser's x0 for a record, with the present patches; gradients flow if they are enabled."""
        ...


@dataclass
class EngineProblem:
    """`CacheProblem` of a loaded engine. Compress and parallelize are in force, caches are not.

    Attributes:
        engine, prompts, seeds: one sample a prompt and seed.
        checks: how many of the last samples are held out.
        batch: samples evaluated at once.
        on_call: called with (title, calls done, calls in all).
    """

    engine: Engine
    prompts: Sequence[str]
    seeds: Sequence[int]
    checks: int
    batch: int = 8
    on_call: Callable[[str, int, int], None] = lambda title, done, total: None
    counter: Counter = field(init=False)

    def __post_init__(self) -> None:
        from suite.diffusion.denoiser import Counter

        self.counter = Counter()
        probe = self._problem(slice(0, 1))
        self.network, self.run = self.engine.network, probe.run
        times = probe.times if probe.times.ndim == 1 else probe.times.amax(1)  # as `Call` says it
        self.times: list[float] = times.tolist()

    def _parts(self, held_out: bool) -> list[slice]:
        first, last = (
            (len(self.seeds) - self.checks, len(self.seeds)) if held_out else (0, len(self.seeds) - self.checks)
        )
        return [slice(at, min(at + self.batch, last)) for at in range(first, last, self.batch)]

    def _problem(self, part: slice, observe: Callable[..., Any] | None = None) -> Problem:
        return self.engine.problem(self.prompts[part], self.seeds[part], self.counter, observe)

    def _march(self, title: str, held_out: bool, observe: Callable[..., Any] | None = None) -> Iterator[Tensor]:
        from dataclasses import replace

        import torch

        from suite.diffusion.sampler import Progress, march

        parts = self._parts(held_out)
        steps = len(self.times) - 1
        for number, part in enumerate(parts):
            problem = self._problem(part, observe)

            def on_step(progress: Progress, done: int = number * steps) -> None:
                self.on_call(title, done + progress.step + 1, steps * len(parts))

            with torch.inference_mode():
                yield march(replace(problem, on_step=on_step))

    def sample(
        self, title: str, install: Callable[[Patches], None] | None = None, held_out: bool = False
    ) -> list[Tensor]:
        """See `CacheProblem`."""
        with patched(install):
            return list(self._march(title, held_out))

    def records(self, title: str, held_out: bool = False) -> list[list[Record]]:
        """See `CacheProblem`."""
        import torch

        from suite.fitting.calibration import Record

        batches: list[list[Record]] = []

        class Recorder:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def denoise(self, x: Tensor, t: Tensor, cond: Any, call: Any) -> Tensor:
                with torch.inference_mode(False):  # so that gradients may flow through what is recorded
                    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
                    batches[-1].append(Record(x.clone(), t.clone(), kept, call))
                return self.inner.denoise(x, t, cond, call)

        batches.append([])
        for _ in self._march(title, held_out, Recorder):
            batches.append([])
        return [b for b in batches if b]

    def answer(self, record: Record) -> Tensor:
        """See `CacheProblem`."""
        return self.engine.bare(self.run, self.counter).denoise(record.x, record.t, record.cond, record.call)


@contextmanager
def patched(install: Callable[[Patches], None] | None) -> Iterator[None]:
    """Patches for a while."""
    from suite.network.patch import Patches

    patches = Patches()
    try:
        if install:
            install(patches)
        yield
    finally:
        patches.undo()
