"""What every calibrated cache has in common: finding its file, and refusing one of another model or run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.fitting.cache_file import CacheFile
from suite.plugin import NamesPath, Plugin

if TYPE_CHECKING:
    from suite.host.models import ModelFolder
    from suite.recipe import Recipe
    from suite.run import Run


CalibrationOption = Annotated[str, NamesPath("calibrations")]
"""The type of an option that names a calibration's file, or a calibration that comes with the suite."""


class Calibrated(Plugin):
    """A cache that goes by a file with a stamp.

    Attributes:
        called: the plugin's name, which is the calibration's method too.
        file: as in the subclass's options.
        threshold: likewise; 0 computes everything.
    """

    called: ClassVar[str]
    file: str | None
    threshold: Any

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    @property
    def source(self) -> str:
        """The file, for messages."""
        return self.file or "shipped"

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        """The calibration must be of this model and run."""
        check(self.called, self.file, recipe, folder)

    def calibration(self, run: Run) -> CacheFile:
        """The file's content; see `of_run`."""
        return of_run(self.called, self.file, run)


def opened(method: str, file: str | None, model: str, steps: int) -> CacheFile:
    """The calibration that is meant; a file that is named must be there.

    Raises:
        ConfigError: see `suite.fitting.cache_file.find` and `read`.
    """
    return cache_file.read(cache_file.find(file, method, model, steps), method)


def check(method: str, file: str | None, recipe: Recipe, folder: ModelFolder) -> None:
    """Refuse a request that the calibration does not fit, before anything is loaded.

    Raises:
        ConfigError: there is no calibration, or it is of something else; what to type.
    """
    assert recipe.steps is not None
    try:
        content = opened(method, file, folder.name, recipe.steps)
    except ConfigError as error:
        if file is not None:
            raise
        make = cache_file.how_to_make(method, str(folder.fact("modality")), folder.name, recipe)
        raise ConfigError(f"{method} needs a calibration for {folder.name} at {recipe.steps} steps: {make}") from error
    cache_file.check(content, file or cache_file.default_name(method, folder.name, recipe.steps), recipe, folder)


def of_run(method: str, file: str | None, run: Run) -> CacheFile:
    """The calibration for a run, as the hook needs it.

    Raises:
        ConfigError: there is none, or it is of another number of steps.
    """
    content = opened(method, file, run.model, run.steps)
    cache_file.check_steps(content, file or "shipped", run.steps)
    return content


def check_threshold(method: str, threshold: float, usual: float) -> None:
    """Refuse what is no threshold.

    Raises:
        ConfigError: below 0 or not a number.
    """
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise ConfigError(f"{method}: threshold = {threshold}: expected 0 or more, e.g. {method}:threshold={usual:g}")


def check_counts(method: str, low: int, **counts: int | None) -> None:
    """Refuse numbers of steps below `low`; None is allowed.

    Raises:
        ConfigError: one is.
    """
    for name, value in counts.items():
        if value is not None and value < low:
            raise ConfigError(f"{method}: {name} = {value}: expected {low} or more steps")
