"""`Result`: the artifacts of one batch, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import EmptyError, PluginError, TakenError
from suite.files.output import another, targets, write
from suite.host.discovery import MODALITIES, find, installed
from suite.modality import Modality
from suite.observe.report import RunReport


@dataclass(frozen=True)
class Result:
    """Artifacts of one batch and what happened. A copy or pickle leaves the model behind, and can still be saved."""

    artifacts: list[Any]
    report: RunReport
    modality: Modality
    #: The run was ended early by Ctrl-C; artifacts are what there was then, perhaps fewer than prompts.
    stopped: bool = False
    #: What the artifacts were decoded from: x0 [B, ...], or after distillation a list of `Distilled`.
    content: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "modality"}

    def __getattr__(self, name: str) -> Any:
        # Asked for what is not there: the modality of a result that was unpickled. Writing files needs no model.
        if name != "modality" or "report" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        cls = find(self.report.modality, installed(MODALITIES), "modality").load()
        object.__setattr__(self, name, object.__new__(cls))
        return self.__dict__[name]

    def metadata(self, index: int) -> dict[str, Any]:
        """What is written into artifact `index`: enough to make it again."""
        return {"suite": self.report.to_dict(), "index": index}

    def save(self, output: str | Path, overwrite: bool = False) -> list[Path]:
        """Write all artifacts; see `suite.files.output.targets` for the names.

        Args:
            overwrite: replace what has these names; without it only a file that is named exactly is replaced.

        Raises:
            EmptyError: some have no content; the others are written.
        """
        cls, place = self.modality, Path(output)
        files = targets(place, len(self.artifacts), cls.suffixes, cls.joins, cls.beside, overwrite)
        fresh = not overwrite and place not in files
        saved: list[Path] = []
        empty: list[EmptyError] = []
        for index, file in enumerate(files):
            try:
                main, *_ = self.save_one(index, file, join=file in saved, fresh=fresh)
                saved.append(main)
            except EmptyError as error:
                empty.append(error)
        if empty:
            raise EmptyError(f"{len(empty)} of {len(files)} are empty, the others are saved: {empty[0]}") from empty[0]
        return list(dict.fromkeys(saved))

    def save_one(self, index: int, file: Path, join: bool = False, fresh: bool = False) -> list[Path]:
        """Write artifact `index` to `file`, atomically, with its metadata; returns it and what lies beside.

        Args:
            join: the file holds results of this run already, which stay (`Modality.joins`).
            fresh: nothing is replaced; if another process has taken the name meanwhile, the next number is.

        Raises:
            EmptyError: it has no content (`Modality.why_empty`); what lies beside it is written.
        """
        artifact, metadata = self.artifacts[index], self.metadata(index)
        joins = file.suffix.lower() in self.modality.joins
        extras = {} if joins else self.modality.extras(artifact, metadata)
        if odd := extras.keys() - set(self.modality.beside):
            raise PluginError(f"modality {self.modality.name}: {', '.join(sorted(odd))} is not among its `beside`")
        why = self.modality.why_empty(artifact)
        while True:
            beside = {file.with_name(file.name + end): save for end, save in extras.items()}
            written: list[Path] = []
            try:
                for extra, save in beside.items():  # first: a result that is there has all that belongs to it
                    write(extra, save, fresh=fresh)
                    written.append(extra)
                if why:
                    raise EmptyError(why + (f"; kept: {', '.join(map(str, beside))}" if beside else ""))
                write(file, lambda made: self.modality.save(artifact, made, metadata), join, fresh)
                return [file, *beside]
            except TakenError:
                for extra in written:
                    extra.unlink(missing_ok=True)
                file = another(file)
