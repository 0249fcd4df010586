"""Temporary places: exclusive, flushed, removed on failure, and swept when their process is gone."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from suite.errors import OutputError, TakenError
from suite.files import temporary
from suite.files.output import atomically, write, write_text


def left_by_a_dead_process(folder: Path) -> Path:
    """What a process leaves that ends in the middle of a write."""
    code = """if 1:
        import os, sys
        from pathlib import Path
        from suite.files.output import atomically
        with atomically(Path(sys.argv[1]) / "a.safetensors") as made:
            made.write_text("half")
            os._exit(9)"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    (left,) = folder.glob(".suite-*")
    return left


def test_the_next_write_removes_what_a_dead_process_left_and_nothing_else(tmp_path: Path):
    left = left_by_a_dead_process(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))  # what is half written has no name that an entry could have
    pid = left.name.split("-")[2]
    others = [
        left.with_name(left.name.replace(pid, str(os.getppid()))),  # alive
        left.with_name(left.name.replace(temporary._host(), "0" * 8)),  # another host's process may live
        left.with_name(left.name + ".bak"),
        tmp_path / ".suite-precious",
    ]
    for other in others:
        other.mkdir()
    a_file = left.with_name(left.name.rpartition("-")[0] + f"-{0:016x}.tmp")
    a_file.write_text("a file has not our form")
    write_text(tmp_path / "b.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(o.name for o in others), a_file.name, "b.txt"])


def test_a_link_of_our_form_is_not_followed(tmp_path: Path):
    left = left_by_a_dead_process(tmp_path)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("kept")
    link = left.with_name(left.name.rpartition("-")[0] + f"-{0:016x}.tmp")
    link.symlink_to(victim)
    write_text(tmp_path / "b.txt", "whole")
    assert (victim / "precious.txt").read_text() == "kept" and not left.exists()


def test_nothing_is_left_after_a_failure(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), atomically(tmp_path / "a.txt") as made:
        made.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_fresh_name_is_never_replaced(tmp_path: Path):
    (tmp_path / "a.txt").write_text("theirs")
    with pytest.raises(TakenError):
        write(tmp_path / "a.txt", lambda made: made.write_text("mine"), fresh=True)
    write(tmp_path / "b.txt", lambda made: made.write_text("mine"), fresh=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "theirs", "b.txt": "mine"}


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, flushed = tmp_path / "a.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append((os.fstat(fd).st_size, target.exists())), sync(fd)))
    write_text(target, "whole")
    assert flushed[0] == (5, False) and len(flushed) == 2  # then its folder, for the name


def test_a_folder_without_room_is_an_error_of_the_output(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    value = torch.zeros(100_000)
    try:
        for save in (
            lambda made: made.write_bytes(bytes(100_000)),
            lambda made: save_file({"a": value}, made),
            lambda made: torch.save(value, made),
        ):
            with pytest.raises(OutputError, match=r"could not be written: .*nothing half-written"):
                write(tmp_path / "a.bin", save)
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_stay_what_they_are(tmp_path: Path):
    def fail(made: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write(tmp_path / "a.txt", fail)
