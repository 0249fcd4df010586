"""`Turn`: one run at a time on one loaded network, whichever thread asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from suite.errors import ConfigError


class Turn:
    """Shared by an engine and all that `Engine.under` made of it, because a run patches the network they share.

    Attributes:
        closed: the network is given up; nobody gets a turn any more.
    """

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._owner = 0

    @contextmanager
    def taken(self, closing: bool = False) -> Iterator[None]:
        """Wait until no other thread runs, and keep others waiting.

        Raises:
            ConfigError: this thread is in the middle of a run and would wait for itself, or the engine is closed.
        """
        if self._owner == threading.get_ident():
            raise ConfigError(
                "the engine was used from within its own run (by on_step or a plugin); wait until the run is over, or "
                "load a second engine"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                if not closing:
                    self.check_open()
                yield
            finally:
                self._owner = 0

    def check_open(self) -> None:
        """ConfigError if the engine is closed."""
        if self.closed:
            raise ConfigError("this engine is closed; load it again with Engine.from_recipe(...)")
