"""`Job`: a checked request. Loads the engine, generates in batches, and saves each batch when it is finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError, SuiteError
from suite.output import write
from suite.plan import Plan
from suite.request import Request, resolve

if TYPE_CHECKING:
    from suite.engine import Engine
    from suite.start import Init

INTERRUPTED = 130


def open_engine(plan: Plan, device: str | None) -> Engine:
    """Import torch and load the model.

    Raises:
        ConfigError: the device is not here; see also `Engine`.
    """
    import torch

    from suite.engine import Engine

    if device not in (None, "cpu"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--device {device} is not here: {reason}; try --device cpu") from error
    return Engine(plan, device)


def is_writer() -> bool:
    """Whether this process writes and prints: under torchrun only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Job:
    """A checked request and how far it has come."""

    plan: Plan
    prompts: list[str]
    seeds: list[int]
    files: list[Path]
    negative: str
    options: Mapping[str, Any]
    init: Init | None
    device: str | None
    batch: int
    report_file: Path | None
    count_macs: bool
    watch_blocks: bool
    as_json: bool
    saved: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finished: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> int:
        """Generate, save, print; returns the exit code."""
        for warning in self.plan.warnings_for(self.negative) if is_writer() else ():
            print(f"warning: {warning}", file=sys.stderr)
        cls = self.plan.modality.load()
        values = resolve(cls.options, self.options, self.plan.modality.name)
        cls.check(self.plan.folder, Request(tuple(self.prompts), self.negative, values, self.init))
        try:
            self._generate()
        except KeyboardInterrupt:
            return self._stopped()
        except SuiteError as error:
            self._write_report()
            if self.finished:
                error.args = (f"{error}; {self._count()}",)
            raise
        self._write_report()
        if is_writer():
            self._print()
        return 0

    def _generate(self) -> None:
        from suite.mesh import Mesh

        try:
            with open_engine(self.plan, self.device) as engine, self._progress() as on_step:
                for start in range(0, len(self.prompts), self.batch):
                    self._one_batch(engine, start, on_step)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise ConfigError(f"not enough memory for --batch {self.batch}: take a smaller one") from error
            raise
        finally:
            Mesh.leave()

    def _one_batch(self, engine: Engine, start: int, on_step: Callable[[int, int], None]) -> None:
        rows = slice(start, start + self.batch)
        number = start // self.batch
        result = engine.generate_batch(
            self.prompts[rows],
            self.seeds[rows],
            negative=self.negative,
            options=self.options,
            init=self.init,
            on_step=lambda step: on_step(number, step),
            count_macs=self.count_macs,
            watch_blocks=self.watch_blocks,
        )
        self.reports.append(result.report.to_dict())
        if not is_writer():
            return
        for index, file in enumerate(self.files[rows][: len(result.artifacts)]):
            written = result.save_one(index, file, join=file in self.saved)
            self.saved += [path for path in written if path not in self.saved]
            self.finished += 1
        if not self.files:  # a printable modality without -o
            shown = [result.modality.show(artifact) for artifact in result.artifacts]
            self.texts += shown
            self.finished += len(shown)
            if not self.as_json:
                print(*shown, sep="\n", flush=True)
        if result.stopped:
            raise KeyboardInterrupt

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int, int], None]]:
        """A bar over all steps on stderr if that is a terminal; yields (batch, step) -> None."""
        if not (is_writer() and sys.stderr.isatty()):
            yield lambda batch, step: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        cls, steps = self.plan.modality.load(), self.plan.recipe.steps or 1
        steps = self.init.steps(steps) if self.init else steps
        sizes = [len(self.prompts[at : at + self.batch]) for at in range(0, len(self.prompts), self.batch)]
        work = [cls.work(steps, self.options, size) for size in sizes]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("steps", total=sum(work))
            yield lambda batch, step: bar.update(task, completed=sum(work[:batch]) + step + 1)

    def _count(self) -> str:
        return f"{self.finished} of {len(self.prompts)} finished" + (" and stay" if self.files else "")

    def _stopped(self) -> int:
        self._write_report()
        if is_writer():
            text = f"stopped: {self._count()}"
            if self.as_json:
                print(json.dumps({"error": text, **self._results()}))
            else:
                print(text, *self.saved, sep="\n", file=sys.stderr)
        return INTERRUPTED

    def _results(self) -> dict[str, Any]:
        texts = {"texts": self.texts} if self.texts else {}
        return {"files": [str(f) for f in self.saved], **texts, "reports": self.reports}

    def _write_report(self) -> None:
        """Also after a failure, for what was finished before it."""
        if self.report_file is not None and is_writer() and (self.saved or self.texts):
            content = json.dumps(self._results(), indent=2) + "\n"

            def put(temporary: Path) -> None:
                temporary.write_text(content, encoding="utf-8")

            write(self.report_file, put)

    def _print(self) -> None:
        if self.as_json:
            print(json.dumps(self._results()))
            return
        for file in self.saved:
            print(file)
        if sys.stderr.isatty():
            seconds = sum(r["seconds"]["sample"] for r in self.reports)
            nfe = self.reports[0]["nfe"]
            print(f"{len(self.prompts)} in {seconds:.1f} s of sampling, {nfe:g} evaluations each", file=sys.stderr)
