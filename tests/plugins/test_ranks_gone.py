"""A rank that dies, or stands still, is named on the others; nobody waits for ever.

This file is also the program of a rank: `python test_ranks_gone.py HOW`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from suite.errors import ConfigError, RankError, SuiteError
from suite.mesh import TIMEOUT, VARIABLE, Mesh, seconds_of

ROOT = Path(__file__).resolve().parents[2]
#: A rank imports torch before it starts, on a machine that may be busy.
LIMIT = 60.0
WAIT = 2.0


def main(how: str) -> int:
    """Rank 1 leaves after the first exchange; rank 0 waits for it as the command does, and says what it was told."""
    mesh = Mesh.current()
    mesh.all_gather(torch.ones(1))
    print("met", flush=True)
    if mesh.rank == 1:
        if how == "dies":
            os._exit(1)
        time.sleep(LIMIT)  # stands still
    try:
        mesh.barrier() if how == "barrier" else mesh.all_gather(torch.ones(1))
    except SuiteError as error:
        print(f"error: {error}", flush=True)
        os._exit(error.exit_code)  # not through the group's own farewell
    return 0


def two(how: str, **variables: str) -> list["subprocess.Popen[str]"]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
            "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables,
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), how]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return ranks


def told(ranks: list["subprocess.Popen[str]"]) -> tuple[int | None, str]:
    """How rank 0 ended and what it said; the others are ended."""
    try:
        out, _ = ranks[0].communicate(timeout=LIMIT)
        return ranks[0].returncode, out
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("how", ["still", pytest.param("barrier", marks=pytest.mark.slow)])
def test_a_rank_that_gives_no_answer_is_gone_after_the_timeout(how: str) -> None:
    code, out = told(two(how, **{VARIABLE: str(WAIT)}))
    assert code == 2, out
    assert "error: rank 1 is gone (no answer for 2 s; SUITE_RANK_TIMEOUT=" in out


def test_a_rank_that_dies_is_gone_at_once() -> None:
    began = time.monotonic()
    code, out = told(two("dies"))
    assert code == 2 and "error: rank 1 is gone (its connection is closed" in out, out
    assert time.monotonic() - began < TIMEOUT


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_gone_after_the_timeout() -> None:
    ranks = two("stopped", **{VARIABLE: str(WAIT)})
    assert ranks[1].stdout is not None and ranks[1].stdout.readline() == "met\n"
    ranks[1].send_signal(signal.SIGSTOP)
    code, out = told(ranks)
    assert code == 2 and "error: rank 1 is gone (no answer for 2 s" in out, out


@pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_timeout_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ConfigError, match=r"SUITE_RANK_TIMEOUT = .*: expected seconds above 0"):
        Mesh.current()
    assert seconds_of(5) == 5  # what is given in Python comes first


def test_the_default_is_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert seconds_of() == Mesh().timeout == 60
    with pytest.raises(ConfigError, match="rank timeout = '-1'"):
        Mesh.current(timeout=-1)


def test_more_ranks_are_all_named_and_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RankError, match="one of the ranks 0, 2 is gone"), Mesh(1, 3)._answered():
        raise RuntimeError("[gloo] Timed out waiting 60000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="shapes"), Mesh(1, 3)._answered():
        raise RuntimeError("shapes differ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
