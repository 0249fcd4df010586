"""`--launch N`: ranks are children that end together, and one speaks for all."""

import os
import subprocess
import sys
import threading
import time

import pytest

from suite.cli import launch
from suite.cli.launch import RankError


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    """Start ranks that run a line of Python instead of a request."""
    started: list[subprocess.Popen[bytes]] = []

    def start(words, environment):
        process = subprocess.Popen([sys.executable, "-c", words[0]], env=environment, process_group=0)
        started.append(process)
        return process

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "GRACE", 1.0)
    yield started
    assert all(process.poll() is not None for process in started)


class Shared:
    class recipe:
        parallelize = ("cfg",)


def go(code: str, size: int = 2) -> int:
    return launch.start_ranks(Shared, [code], size, 5)  # pyright: ignore[reportArgumentType]


def test_ranks_know_each_other(ranks, tmp_path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR SUITE_SEED".split()
    line = f"import os; open(rf'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert go(line, 3) == 0
    assert [(tmp_path / str(k)).read_text() for k in range(3)] == [f"{k} {k} 3 3 127.0.0.1 5" for k in range(3)]


def test_the_first_exit_code_that_is_not_0_is_the_commands(ranks) -> None:
    assert go("import os, sys; sys.exit(2 * (os.environ['RANK'] == '1'))") == 2


def test_a_rank_that_is_killed_ends_the_others(ranks, capsys) -> None:
    started = time.monotonic()
    line = """
import os, signal, sys, time
if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
try: time.sleep(60)
except KeyboardInterrupt: sys.exit(130)
"""
    assert go(line) == 137
    assert "error: rank 1 of 2 is gone: it was ended by SIGKILL" in capsys.readouterr().err
    assert time.monotonic() - started < 20


def test_a_rank_that_heeds_nothing_is_killed_and_said_to_be(ranks) -> None:
    line = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if os.environ['RANK'] == '1': sys.exit(2)
time.sleep(60)
"""
    with pytest.raises(RankError, match="rank 1 of 2 is gone: it ended with exit code 2") as gone:
        go(line)
    assert gone.value.exit_code == 2


def test_signals_are_passed_on(ranks) -> None:
    line = """
import sys, time
try: time.sleep(60)
except KeyboardInterrupt: sys.exit(130)
"""

    def interrupt() -> None:
        time.sleep(1.5)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert go(line) == 130
    thread.join()
