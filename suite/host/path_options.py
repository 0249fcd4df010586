"""Options that name files and folders: which recipes may set them. No torch here.

A recipe that lies in a result or in a model folder was written by whoever made that file. It may name what comes with
the suite, and never a path: reading another file, or writing a store, is for the one who runs the suite to ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from suite.errors import ConfigError, SuiteError
from suite.files.untrusted import shown
from suite.host.discovery import find, installed
from suite.plugin import NamesPath, path_options
from suite.recipe import CONFIGS, Named, Recipe

STORE = "trajectory-store"
"""The effect of plugins that keep states of runs for later runs."""


def is_shipped(marker: NamesPath, value: Any) -> bool:
    """Whether a value names what comes with the suite; several names are joined by `+`."""
    known = {p.stem for p in (CONFIGS / marker.shipped).iterdir()} if marker.shipped else set[str]()
    return isinstance(value, str) and all(name in known or name in marker.names for name in value.split("+"))


def refuse_paths(recipe: Recipe, source: str) -> None:
    """Refuse a recipe of somebody else that sets an option to a path.

    Args:
        source: whose recipe it is, for the message.

    Raises:
        ConfigError: the plugin and the option.
    """
    for hook, named in recipe.named():
        for key, marker in _set(named):
            if not is_shipped(marker, named.options[key]):
                raise ConfigError(
                    f"{source} sets {named.name}:{key}={shown(named.options[key])[1:-1]}, which names a file or a "
                    f"folder; only you may: give it yourself, in a recipe or as --{hook}"
                )


def without_stores(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with stores that end with the process, and the stores that it named."""
    dropped: list[str] = []

    def private(named: Named) -> Named:
        keys = [key for key, _ in _set(named)] if STORE in _effects(named) else []
        dropped.extend(f"{named.name}:{key}={shown(named.options[key])[1:-1]}" for key in keys)
        return Named(named.name, {k: v for k, v in named.options.items() if k not in keys})

    changed = {
        f.name: tuple(map(private, value)) if isinstance(value, tuple) else private(value)
        for f in fields(recipe)
        if f.name != "guidance_interval" and isinstance(value := getattr(recipe, f.name), tuple | Named)
    }
    return replace(recipe, **changed), dropped


def _set(named: Named) -> Iterator[tuple[str, NamesPath]]:
    """The options of a named plugin that name paths and are set; of a plugin that cannot be loaded none."""
    marked = path_options(_class(named)) if named.options else {}
    for key in named.options:
        if marker := marked.get(key.replace("-", "_")):
            yield key, marker


def _effects(named: Named) -> frozenset[str]:
    effects: Any = getattr(_class(named), "effects", frozenset())
    return effects if isinstance(effects, frozenset) else frozenset()


def _class(named: Named) -> type:
    """The plugin's class; `object` if there is none, which `suite.host.manager.load` refuses with its reason."""
    try:
        found = find(named.name, installed()).load()
    except SuiteError:
        return object
    return found if isinstance(found, type) else object


def stores_used(plugins: list[Mapping[str, Any]]) -> list[str]:
    """Names of plugins in a report that began samples with what a store held."""
    out = []
    for plugin in plugins:
        facts, name = plugin.get("facts"), str(plugin["name"]).partition(":")[0]
        if isinstance(facts, Mapping) and facts.get("hits") and STORE in _effects(Named(name)):
            out.append(name)
    return out
