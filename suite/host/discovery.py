"""Which plugins and modalities are installed: read from the distributions' metadata, importing none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from suite.errors import ConfigError, PluginError
from suite.host.suggest import nearest

PLUGINS = "suite"
MODALITIES = "suite.modalities"


@dataclass(frozen=True)
class Entry:
    """One installed entry point.

    Attributes:
        name: what a recipe calls it.
        target: `package.module:Class`.
        distribution, version: who brings it.
    """

    name: str
    target: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """`name (distribution version)`, for messages."""
        return f"{self.name} ({self.distribution} {self.version})"

    def load(self) -> Any:
        """Import the target.

        Raises:
            PluginError: the import fails; the message names the entry point and the cause.
        """
        module, _, attribute = self.target.partition(":")
        try:
            return metadata.EntryPoint(self.name, self.target, PLUGINS).load()
        except Exception as error:
            raise PluginError(
                f"plugin {self.origin} cannot be loaded from {module}:{attribute}: {type(error).__name__}: {error}"
            ) from error


def installed(group: str = PLUGINS) -> dict[str, Entry]:
    """Entries of a group by name, sorted. `SUITE_NO_PLUGINS` (names separated by commas) hides some.

    Raises:
        ConfigError: two distributions bring the same name; both are named with their versions.
    """
    hidden = set(filter(None, os.environ.get("SUITE_NO_PLUGINS", "").split(",")))
    found: dict[str, Entry] = {}
    for distribution in metadata.distributions():
        points = [p for p in distribution.entry_points if p.group == group and p.name not in hidden]
        about = distribution.metadata if points else {}  # parsed anew each time it is asked for
        for point in points:
            entry = Entry(point.name, point.value, about["Name"], about["Version"])
            other = found.setdefault(point.name, entry)
            if (other.target, other.distribution) != (entry.target, entry.distribution):
                raise ConfigError(
                    f"two distributions bring a plugin called {point.name!r}: {other.distribution} "
                    f"{other.version} and {entry.distribution} {entry.version}; uninstall one of them, or hide "
                    f"the name with SUITE_NO_PLUGINS={point.name}"
                )
    return dict(sorted(found.items()))


def find(name: str, entries: Mapping[str, Entry], what: str = "plugin") -> Entry:
    """The entry called `name`.

    Raises:
        ConfigError: there is none; the nearest names are offered.
    """
    if name in entries:
        return entries[name]
    hint = nearest(name, entries) or f"; installed: {', '.join(entries) or 'none'}"
    raise ConfigError(f"unknown {what} {name!r}{hint}")
