"""What a bench has measured so far, in files that are whole at any time: JSON to go on with, CSV to read elsewhere."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.files.inputs import read_json
from suite.files.output import write, write_text
from suite.files.untrusted import Items, Section, Text, Whole, check, shown

FORMAT = 2
_ROWS = Items(Section(), most=1_000_000)
_CONTENT = Section(
    {
        "format": Whole(1, 10_000),
        "bench": Text(100),
        "request": Section(),
        "reference": Section(),
        "rows": _ROWS,
        "left_out": _ROWS,
        "made": Section(),
        "checksum": Text(64, "[0-9a-f]{64}", "the SHA-256 of the rest, 64 hexadecimal digits"),
    }
)


@dataclass
class Record:
    """Rows of one bench in FOLDER/KIND.json and FOLDER/KIND.csv.

    Attributes:
        folder, kind: where.
        request: what all rows have in common; another request cannot be gone on with.
        reference: what they are compared with, once it is known.
        rows: one a cell.
        left_out: what was not measured, each with its reason.
        made: versions and device; for the reader, never compared.
    """

    folder: Path
    kind: str
    request: Mapping[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    made: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path, kind: str, request: Mapping[str, Any], *, resume: bool) -> Record:
        """A new record, or with `resume` the one that lies there.

        Raises:
            ConfigError: there is one already, or the one that lies there is damaged or of another request.
        """
        record = Record(folder, kind, json.loads(json.dumps(request)))
        if not record.file.exists():
            return record
        if not resume:
            raise ConfigError(f"{record.file} exists; go on with it by --resume, or take another folder with -o")
        content = _read(record.file)
        theirs = content["request"]
        for key, mine in record.request.items():
            if theirs.get(key) != mine:
                raise ConfigError(
                    f"{record.file} was measured with {key} = {shown(theirs.get(key))}, not {shown(mine)}: ask for "
                    "the same, or take another folder with -o"
                )
        record.rows, record.reference = content["rows"], content["reference"]
        return record

    @property
    def file(self) -> Path:
        """The JSON file."""
        return self.folder / f"{self.kind}.json"

    def beside(self, ending: str) -> Path:
        """Another file of this bench."""
        return self.folder / f"{self.kind}{ending}"

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def leave_out(self, reason: str, **what: Any) -> None:
        """Say why something is not measured."""
        entry = what | {"reason": reason}
        if entry not in self.left_out:
            self.left_out.append(entry)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        content = {
            "format": FORMAT,
            "bench": self.kind,
            "request": dict(self.request),
            "reference": self.reference,
            "rows": self.rows,
            "left_out": self.left_out,
            "made": dict(self.made),
        }
        return content | {"checksum": _checksum(content)}

    def save(self) -> None:
        """Write both files, each at once."""
        write_text(self.file, json.dumps(self.to_dict(), indent=1) + "\n")
        write(self.beside(".csv"), self._csv)

    def _csv(self, file: Path) -> None:
        flat = [_flat(row) for row in self.rows]
        columns = list(dict.fromkeys(key for row in flat for key in row))
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(flat)


def _read(file: Path) -> dict[str, Any]:
    """What lies in a record's file, as it was written."""
    content = check(read_json(file, "record"), Section({"format": Whole(1, 10_000)}), f"record {file}")
    if content["format"] != FORMAT:
        raise ConfigError(f"{file} has the format {content['format']!r}, this version writes {FORMAT}; take another -o")
    check(content, _CONTENT, f"record {file}")
    if content["checksum"] != _checksum({key: value for key, value in content.items() if key != "checksum"}):
        raise ConfigError(
            f"record {file} is damaged or was edited: its checksum is of other content; take another folder with -o"
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content as one line of JSON with sorted keys."""
    plain = json.loads(json.dumps(content))  # all keys are texts, which can be sorted
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without lists; what lies in a mapping gets a column of its own."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            out |= {f"{key}.{k}": v for k, v in value.items()}
        elif not isinstance(value, list | tuple):
            out[key] = value
    return out
