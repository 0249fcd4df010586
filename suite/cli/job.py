"""`Job`: a checked request. Loads the engine, generates in batches, and saves each batch when it is finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError, EmptyError, SuiteError, out_of_memory
from suite.files.output import write_text
from suite.files.undivided import remembered, undivided
from suite.files.untrusted import message
from suite.host.plan import Plan
from suite.request import Request, resolve

if TYPE_CHECKING:
    from suite.diffusion.start import Init
    from suite.engine.engine import Engine
    from suite.modality import Modality
    from suite.request import Value

INTERRUPTED = 130
TOLD = 10
"""Warnings, refused prompts and empty results of which each is printed; of more only their number is."""


def open_engine(plan: Plan, device: str | None) -> Engine:
    """Import torch and load the model.

    Raises:
        ConfigError: the device is not here; see also `Engine`.
    """
    from suite.engine.engine import Engine

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
    fresh: bool
    resume: bool
    overwrite: bool
    done: set[int] = field(default_factory=set)
    joined: set[Path] = field(default_factory=set)
    saved: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finished: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def run(self) -> int:
        """Generate, save, print; returns the exit code."""
        cls = self.plan.modality.load()
        values = resolve(cls.options, self.options, self.plan.modality.name)
        self._check(cls, values)
        if self.resume:
            self._skip(values)
        warnings = [*self.plan.warnings_for(self.negative), *cls.warnings(self.plan.folder, self._request(values))]
        if is_writer():
            _tell("warning: ", list(dict.fromkeys(warnings)))
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
        return EmptyError.exit_code if self.empty else ConfigError.exit_code if self.refused else 0

    def _request(self, values: Mapping[str, Value | None]) -> Request:
        return Request(tuple(self.prompts), self.negative, values, self.init)

    def _check(self, cls: type[Modality], values: Mapping[str, Value | None]) -> None:
        """Leave out the prompts that this model refuses, as long as others are left: a line need not end a file.

        Raises:
            ConfigError: none is left.
        """
        folder, whole = self.plan.folder, self._request(values)
        try:
            return cls.check(folder, whole)
        except ConfigError as error:
            first = error
        refused: dict[str, str] = {}
        for prompt in dict.fromkeys(self.prompts):
            try:
                cls.check(folder, replace(whole, prompts=(prompt,)))
            except ConfigError as error:
                refused[prompt] = str(error)
        kept = [row for row, prompt in enumerate(self.prompts) if prompt not in refused]
        if not kept or not refused:
            raise first
        self.prompts, self.seeds = [self.prompts[row] for row in kept], [self.seeds[row] for row in kept]
        self.files = [self.files[row] for row in kept] if self.files else []
        self.refused = list(refused.values())

    def _skip(self, values: Mapping[str, Value | None]) -> None:
        """Leave what is there of this request as it is. Batches stay as they were, since they decide the last bits."""
        from suite.files.resume import present

        self.done = present(self.plan, self._request(values), self.seeds, self.files, self.overwrite)
        self.joined = {self.files[row] for row in self.done}
        self.finished = len(self.done)

    def _generate(self) -> None:
        if len(self.done) == len(self.prompts):
            return
        from suite.mesh import Mesh

        try:
            with remembered() as stopped, open_engine(self.plan, self.device) as engine, self._progress() as on_step:
                for start in range(0, len(self.prompts), self.batch):
                    self._one_batch(engine, start, on_step)
                    if stopped:
                        raise KeyboardInterrupt
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise ConfigError(f"not enough memory for --batch {self.batch}: take a smaller one") from error
            raise
        finally:
            Mesh.leave()

    def _one_batch(self, engine: Engine, start: int, on_step: Callable[[int, int], None]) -> None:
        rows = slice(start, start + self.batch)
        if self.done.issuperset(range(start, min(start + self.batch, len(self.prompts)))):
            return
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
            if start + index in self.done:
                continue
            try:
                with undivided():  # what is there has been counted
                    written = result.save_one(index, file, file in self.saved or file in self.joined, self.fresh)
                    self.saved += [path for path in written if path not in self.saved]
                    self.finished += 1
            except EmptyError as error:  # the others stay
                self.empty.append(f"{file} (seed {self.seeds[rows][index]}): {error}")
        if not self.files:  # a printable modality without -o
            shown = [result.modality.show(artifact) for artifact in result.artifacts]
            empty = {row: why for row, a in enumerate(result.artifacts) if (why := result.modality.why_empty(a))}
            self.empty += [f"{self.prompts[rows][k]!r} (seed {self.seeds[rows][k]}): {w}" for k, w in empty.items()]
            self.texts += shown
            self.finished += len(shown) - len(empty)
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

    def _shortfall(self) -> str:
        """Which prompts were refused and which results are empty; empty if it is all there."""
        told = [f"{len(found)} {what}" for found, what in ((self.refused, "refused"), (self.empty, "empty")) if found]
        return f"{', '.join(told)}; {self._count()}" if told else ""

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
        skipped = {"skipped": [str(self.files[row]) for row in sorted(self.done)]} if self.resume else {}
        return {"files": [str(f) for f in self.saved], **skipped, **texts, "reports": self.reports}

    def _write_report(self) -> None:
        """Also after a failure, for what was finished before it."""
        if self.report_file is not None and is_writer() and (self.saved or self.texts):
            write_text(self.report_file, json.dumps(self._results(), indent=2) + "\n")

    def _print(self) -> None:
        short = self._shortfall()
        if self.as_json:
            error = {"error": "; ".join([short, *self.refused, *self.empty])} if short else {}
            print(json.dumps({**error, **self._results()}))
            return
        for file in self.saved:
            print(file)
        if short:
            _tell("error: ", [*self.refused, *self.empty])
            print(f"error: {short}", file=sys.stderr)
        if self.resume:
            print(f"skipped: {len(self.done)} of {len(self.prompts)} were there", file=sys.stderr)
        if sys.stderr.isatty() and self.reports:
            seconds = sum(r["seconds"]["sample"] for r in self.reports)
            nfe, made = self.reports[0]["nfe"], len(self.prompts) - len(self.done)
            print(f"{made} in {seconds:.1f} s of sampling, {nfe:g} evaluations each", file=sys.stderr)


def _tell(begin: str, lines: Sequence[str]) -> None:
    """Print the first few of many lines on stderr."""
    for line in lines[:TOLD]:
        print(f"{begin}{message(line)}", file=sys.stderr)
    if len(lines) > TOLD:
        print(f"{begin}and {len(lines) - TOLD} more like these", file=sys.stderr)
