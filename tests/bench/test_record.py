"""The record of a bench: what is written comes back, what was changed since is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from suite.bench.record import FORMAT, Record
from suite.errors import ConfigError

REQUEST = {"model": "tiny", "steps": [4, 8]}


def saved(folder: Path) -> Record:
    record = Record.open(folder, "solvers", REQUEST, resume=False)
    record.rows.append({"solver": "euler", "steps": 4, "error": 0.1 + 0.2})
    record.reference = {"steps": 64, "seconds": 1e-7}
    record.leave_out("it is no solver", solver="none")
    record.save()
    return record


def resume(folder: Path) -> Record:
    return Record.open(folder, "solvers", REQUEST, resume=True)


def test_what_is_saved_comes_back(tmp_path: Path):
    record = saved(tmp_path)
    again = resume(tmp_path)
    assert (again.rows, again.reference) == (record.rows, record.reference)
    again.save()
    assert resume(tmp_path).rows == record.rows


def test_every_changed_character_is_refused(tmp_path: Path):
    file = saved(tmp_path).file
    text = file.read_text()
    for place, character in enumerate(text):
        if character.isspace():
            continue  # between values it means nothing; within texts the checksum below has it
        file.write_text(text[:place] + ("1" if character != "1" else "2") + text[place + 1 :])
        with pytest.raises(ConfigError, match=r"solvers\.json") as caught:
            resume(tmp_path)
        assert caught.value.exit_code == 2
    file.write_text(text.replace("it is no solver", "it is noXsolver"))
    with pytest.raises(ConfigError, match="damaged or was edited"):
        resume(tmp_path)


@pytest.mark.parametrize("key", ["format", "bench", "request", "reference", "rows", "left_out", "made", "checksum"])
@pytest.mark.parametrize("value", [None, "x", -1, 10**400, 1.5, True, [1], [[]], {"x": 10**400}])
def test_values_of_another_kind_are_refused(tmp_path: Path, key: str, value: Any):
    file = saved(tmp_path).file
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=r"solvers\.json") as caught:
        resume(tmp_path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"format": 1e999}', '{"format": ' + "9" * 5000 + "}"])
def test_other_files_are_refused(tmp_path: Path, text: str):
    saved(tmp_path).file.write_text(text)
    with pytest.raises(ConfigError, match=r"solvers\.json"):
        resume(tmp_path)


def test_a_record_without_a_checksum_is_of_an_older_format(tmp_path: Path):
    file = saved(tmp_path).file
    content = json.loads(file.read_text())
    del content["checksum"]
    file.write_text(json.dumps(content | {"format": FORMAT - 1}))
    with pytest.raises(ConfigError, match=f"has the format {FORMAT - 1}, this version writes {FORMAT}"):
        resume(tmp_path)
