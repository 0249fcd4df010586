"""`Plan`: a request checked as far as it can be without torch: names, options, conflicts, rules, model folder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite import recipe
from suite.errors import ConfigError
from suite.host import models
from suite.host.discovery import MODALITIES, Entry, find, installed
from suite.host.manager import Active, Manager, load
from suite.host.models import ModelFolder
from suite.host.path_options import refuse_paths
from suite.recipe import Recipe

DEFAULT_RECIPE = "balanced"
FEW_STEPS = 8
LOSSY_HOOKS = ("compress", "parallelize", "cache")


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes:
        modality: its entry point, not yet imported.
        folder: the model.
        recipe: complete: it names a schedule, a solver, steps, guidance and dtype.
        manager: the plugins, registered for this engine alone.
        warnings: rules that advise against the chain.
        allow_noop: a plugin that does nothing is not an error.
        cache_limit: most MiB that all caches may hold together; None is half of the device's memory.
    """

    modality: Entry
    folder: ModelFolder
    recipe: Recipe
    manager: Manager
    warnings: tuple[str, ...]
    allow_noop: bool = False
    cache_limit: float | None = None

    def warnings_for(self, negative: str) -> tuple[str, ...]:
        """`warnings`, and those that only a request brings about: it has a negative prompt.

        Raises:
            RuleError: a rule forbids it.
        """
        words = ["negative-prompt", *run_words(self.recipe, self.folder, self.modality.load().driver)]
        findings = self.manager.enforce_rules(words) if negative else []
        return tuple(dict.fromkeys([*self.warnings, *(f.message for f in findings)]))


def make_plan(
    modality: str,
    wanted: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Recipe | None = None,
    model: str | None = None,
    exact: bool = False,
    allow_noop: bool = False,
    cache_limit: float | None = None,
) -> Plan:
    """Check a request.

    Args:
        modality: entry-point name.
        wanted: a recipe, its name, its file or its content; `balanced` if None.
        overrides: laid over it, e.g. the command line's options.
        model: shipped name or folder; the modality's default if None.
        exact: refuse lossy plugins.
        allow_noop, cache_limit: see `Plan`.

    Raises:
        ConfigError: anything that cannot work as written.
        PluginError: a named plugin cannot be imported or does not fit.
    """
    if cache_limit is not None and not (cache_limit > 0 and math.isfinite(cache_limit)):
        raise ConfigError(f"cache limit = {cache_limit:g}: expected MiB above 0, e.g. --cache-limit 512")
    entry = find(modality, installed(MODALITIES), "modality")
    cls = entry.load()
    folder = models.open_folder(model or _default_model(modality, cls.borrows), modality, cls.borrows, cls.facts)
    borrowed = cls.borrowed if folder.fact("modality") != modality else {}
    defaults = folder.fact("defaults")
    described = folder.path / models.DESCRIPTION
    try:
        base = Recipe.from_dict({**defaults, **borrowed})
    except ConfigError as error:
        raise ConfigError(f"{described}: its defaults: {error}") from error
    refuse_paths(base, f"{described}")
    complete = _read(wanted, modality, folder.tokens).over(base)
    complete = overrides.over(complete) if overrides else complete
    if complete.steps is None or complete.schedule is None or complete.solver is None:
        raise ConfigError(f"model {folder.name}: its defaults in suite.json must name steps, schedule and solver")
    complete = replace(
        complete,
        guidance=1.0 if complete.guidance is None else complete.guidance,
        guidance_interval=complete.guidance_interval or (0.0, 1.0),
        dtype=complete.dtype or "auto",
    )
    active = load(complete, installed(), modality)
    if exact:
        _refuse_lossy(active)
    manager = Manager(active)
    for a in active:
        a.plugin.check(complete, folder)
    findings = manager.enforce_rules(run_words(complete, folder, cls.driver))
    return Plan(entry, folder, complete, manager, tuple(f.message for f in findings), allow_noop, cache_limit)


def run_words(wanted: Recipe, folder: ModelFolder, driver: str = "sample") -> list[str]:
    """Words of the run itself, for the rules."""
    words = ["guided" if wanted.guidance != 1 else "unguided"]
    if driver != "sample":
        words.append(driver)
    if not folder.tokens:
        words.append("real-vectors")
    if (wanted.steps or 0) < FEW_STEPS or folder.facts.get("few_step"):
        words.append("few-step")
    if folder.facts.get("guidance_distilled"):
        words.append("guidance-distilled")
    return words


def _read(wanted: Recipe | str | Path | Mapping[str, Any] | None, modality: str, tokens: bool) -> Recipe:
    if isinstance(wanted, Recipe):
        return wanted
    if isinstance(wanted, Mapping):
        return Recipe.from_dict(wanted, modality, tokens)
    return recipe.read(str(wanted or DEFAULT_RECIPE), modality, tokens)


def _default_model(modality: str, borrows: Sequence[str]) -> str:
    for source in (modality, *borrows):
        for name, entry in models.shipped(source).items():
            if entry.get("default"):
                return name
    raise ConfigError(f"no model of the modality {modality!r} is shipped; give one with --model FOLDER")


def _refuse_lossy(active: list[Active]) -> None:
    lossy = [a.text for a in active if a.hook in LOSSY_HOOKS and not a.plugin.lossless]
    if lossy:
        raise ConfigError(f"--exact refuses lossy plugins: {', '.join(lossy)}; drop --exact or drop them")


def broken_plugins() -> dict[str, str]:
    """Installed plugins that cannot be imported: name -> why. Each is warned about once."""
    out = {}
    for name, entry in installed().items():
        try:
            entry.load()
        except Exception as error:
            out[name] = str(error)
            warnings.warn(str(error), stacklevel=2)
    return out
