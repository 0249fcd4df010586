"""`--launch N`: the same command as N ranks on this machine, without torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from suite.errors import ConfigError, SuiteError
from suite.host.plan import Plan
from suite.host.prompts import CHOSEN

MAX_RANKS = 64
GRACE = 10.0
"""Seconds in which ranks end by themselves, once one is gone or they are asked to; then they are killed."""
LOOK = 0.05
HEEDED = 2
"""Signals that are handed on as they are; one more kills."""
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RankError(SuiteError):
    """A rank ended before the request was done, and none is left to say so; `exit_code` is the rank's."""


def to_start(size: int) -> bool:
    """Whether `--launch` has ranks to start here: they see the same option and are what it asks for.

    Raises:
        ConfigError: something else, such as torchrun, has made this process a rank.
    """
    if size == 1 or CHOSEN in os.environ:
        return False
    if "RANK" in os.environ:
        raise ConfigError(f"--launch {size}: this process is a rank already (RANK is set); leave out --launch")
    return True


def start_ranks(plan: Plan, words: Sequence[str], size: int, seed: int) -> int:
    """Run the command line as `size` ranks and wait for them; returns the first exit code that is not 0.

    Args:
        plan: what they will do, checked before anything starts.
        words: the command line, `--launch` included: a rank knows by its environment that it is one.
        seed: of the first sample, where the command line leaves it to chance.

    Raises:
        ConfigError: no plugin uses ranks.
        RankError: a rank is gone, and so is the one that writes and prints.
    """
    if not plan.recipe.parallelize:
        raise ConfigError(f"--launch {size}: every rank would do the same; name a plugin that shares the work out with "
                          "--parallelize, e.g. --parallelize cfg")  # fmt: skip
    common = os.environ | {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        CHOSEN: str(seed),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    ranks: list[subprocess.Popen[bytes]] = []
    with _passing(ranks) as asked:
        try:
            for rank in range(size):
                ranks.append(_start(words, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            return _wait(ranks, asked)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _start(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A group of its own: a terminal's Ctrl-C would reach a rank twice, by the terminal and from here.
    return subprocess.Popen([sys.executable, "-m", "suite.cli", *words], env=environment, process_group=0)


@contextmanager
def _passing(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand signals on to every rank, and end those that do not heed them; yields what came."""
    asked: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        for process in ranks:
            process.send_signal(number if len(asked) <= HEEDED else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in PASSED}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int:
    """Until all have ended. Once one failed, the others get some time to say why, are interrupted, and killed."""
    first: tuple[int, int] | None = None
    interrupted, deadline = False, float("inf")
    while any(process.poll() is None for process in ranks):
        if first is None:
            first = _failed(ranks)
            if first is not None:
                deadline = time.monotonic() + GRACE / 2
        if time.monotonic() > deadline:
            for process in ranks:
                process.send_signal(signal.SIGKILL if interrupted else signal.SIGINT)
            interrupted, deadline = True, time.monotonic() + GRACE
        time.sleep(LOOK)
    first = first or _failed(ranks)
    if first is None:
        return 0
    rank, code = first
    if asked:
        return abs(code) + 128 * (code < 0)
    error = _ended(rank, code, len(ranks))
    if ranks[0].returncode < 0:  # the one that speaks for all cannot
        raise error
    if code < 0:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _failed(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """(rank, exit code) of one that failed: of one that was killed, if there is any, as others then fail by it."""
    codes = [(rank, code) for rank, process in enumerate(ranks) if (code := process.poll())]
    return min(codes, key=lambda found: found[1] > 0, default=None)


def _ended(rank: int, code: int, size: int) -> RankError:
    how = f"it ended with exit code {code}" if code > 0 else f"it was ended by {signal.Signals(-code).name}"
    error = RankError(f"rank {rank} of {size} is gone: {how}; the others were stopped")
    error.exit_code = code if code > 0 else 128 - code
    return error
