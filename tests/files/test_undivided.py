"""Ctrl-C does not part what belongs together."""

from __future__ import annotations

import signal
import threading

import pytest

from suite.files.undivided import remembered, undivided


def test_ctrl_c_comes_after_the_block() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), undivided():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done and signal.getsignal(signal.SIGINT) is before
    with undivided():
        done.append("nothing came")
    assert len(done) == 2


def test_an_error_inside_is_not_hidden_by_ctrl_c() -> None:
    with pytest.raises(ValueError, match="first"), undivided():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("first")


def test_other_threads_are_let_through() -> None:
    done = []

    def work() -> None:
        with undivided():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_ctrl_c_that_was_swallowed_is_remembered() -> None:
    before = signal.getsignal(signal.SIGINT)
    with remembered() as came:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # as C code does that drops every error
        assert came == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
