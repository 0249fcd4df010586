"""Results that are folders: replaced when they are ours, never mixed with or taken for anything else."""

from pathlib import Path

import pytest

from suite.errors import OutputError
from suite.files.output import RECORD, targets, write

SUFFIXES = (".png", ".frames")


def folder(path: Path, name: str = "000.png") -> None:
    path.mkdir()
    (path / name).write_text(name)
    (path / RECORD).write_text("{}")


def test_an_older_result_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "b.frames"
    write(path, lambda p: folder(p, "old.png"))
    assert targets(path, 1, SUFFIXES) == [path]  # not taken for a folder to write into
    write(path, lambda p: folder(p, "new.png"))
    assert sorted(f.name for f in path.iterdir()) == [RECORD, "new.png"]


def test_a_failure_leaves_the_older_result_and_nothing_else(tmp_path: Path):
    path = tmp_path / "b.frames"
    write(path, lambda p: folder(p, "old.png"))

    def fail(temporary: Path) -> None:
        folder(temporary, "half.png")
        raise OSError("disk full")

    with pytest.raises(OutputError, match="nothing half-written"):
        write(path, fail)
    assert [f.name for f in tmp_path.iterdir()] == ["b.frames"] and (path / "old.png").is_file()


def test_a_folder_of_the_user_is_written_into_never_replaced(tmp_path: Path):
    path = tmp_path / "mine.frames"
    path.mkdir()
    (path / "precious.txt").write_text("kept")
    assert targets(path, 1, SUFFIXES) == [path / "000.png"]
    with pytest.raises(OutputError):
        write(path, folder)
    assert (path / "precious.txt").read_text() == "kept"


def test_results_of_one_ending_can_share_a_file(tmp_path: Path):
    path = tmp_path / "a.png"
    assert targets(path, 3, SUFFIXES, joins=(".png",)) == [path] * 3
    assert targets(path, 2, SUFFIXES, joins=(".frames",)) == [tmp_path / "a-000.png", tmp_path / "a-001.png"]
    path.write_text("from an earlier run")
    for index in range(3):
        write(path, lambda p, index=index: p.write_text(f"{index}\n") and None, join=index > 0)
    assert path.read_text() == "0\n1\n2\n"
