"""`Result`: the artifacts of one batch, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import EmptyError
from suite.modality import Modality
from suite.output import targets, write
from suite.report import RunReport


@dataclass(frozen=True)
class Result:
    """Artifacts of one batch and what happened."""

    artifacts: list[Any]
    report: RunReport
    modality: Modality
    #: The run was ended early by Ctrl-C; artifacts are what there was then, perhaps fewer than prompts.
    stopped: bool = False
    #: What the artifacts were decoded from: x0 [B, ...], or after distillation a list of `Distilled`.
    content: Any = None

    def metadata(self, index: int) -> dict[str, Any]:
        """What is written into artifact `index`: enough to make it again."""
        return {"suite": self.report.to_dict(), "index": index}

    def save(self, output: str | Path) -> list[Path]:
        """Write all artifacts; see `suite.output.targets` for the names.

        Raises:
            EmptyError: some have no content; the others are written.
        """
        files = targets(Path(output), len(self.artifacts), self.modality.suffixes, self.modality.joins)
        saved: list[Path] = []
        empty: list[EmptyError] = []
        for index, file in enumerate(files):
            try:
                self.save_one(index, file, join=file in saved)
                saved.append(file)
            except EmptyError as error:
                empty.append(error)
        if empty:
            raise EmptyError(f"{len(empty)} of {len(files)} are empty, the others are saved: {empty[0]}") from empty[0]
        return list(dict.fromkeys(files))

    def save_one(self, index: int, file: Path, join: bool = False) -> list[Path]:
        """Write artifact `index` to exactly `file`, atomically, with its metadata; returns it and what lies beside.

        Args:
            join: the file holds results of this run already, which stay (`Modality.joins`).

        Raises:
            EmptyError: it has no content (`Modality.why_empty`); what lies beside it is written.
        """
        artifact, metadata = self.artifacts[index], self.metadata(index)
        joins = file.suffix.lower() in self.modality.joins
        extras = {} if joins else self.modality.extras(artifact, metadata)
        beside = {file.with_name(file.stem + e): f for e, f in extras.items()}
        why = self.modality.why_empty(artifact)
        if not why:
            write(file, lambda temporary: self.modality.save(artifact, temporary, metadata), join)
        for extra, save in beside.items():
            write(extra, save)
        if why:
            raise EmptyError(why + (f"; kept: {', '.join(map(str, beside))}" if beside else ""))
        return [file, *beside]
