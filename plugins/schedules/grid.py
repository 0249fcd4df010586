"""A grid from a file: times that were fitted to one model, noise schedule, solver and number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from suite.diffusion.schedule import Schedule
from suite.errors import ConfigError
from suite.fitting import grid as grids
from suite.hookspecs import hookimpl
from suite.plugin import NamesPath, Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.host.models import ModelFolder
    from suite.recipe import Recipe
    from suite.run import Run


@dataclass(frozen=True)
class GivenTimes(Schedule):
    """These times and no others."""

    times: tuple[float, ...]
    source: str

    def timesteps(self, noise: NoiseSchedule, steps: int) -> Tensor:
        import torch

        del noise
        if steps != len(self.times) - 1:
            raise ConfigError(f"grid {self.source} was fitted to {len(self.times) - 1} steps, not {steps}; fit another")
        return torch.tensor(self.times, dtype=torch.float64)


@dataclass(frozen=True)
class Grid(Plugin):
    """What `suite schedule optimize` wrote. A model, solver or number of steps that is not the file's is an error.

    Args:
        file: path of the file, or name of a grid that comes with the suite.
    """

    file: Annotated[str, NamesPath("grids")]

    summary = "a grid that was fitted to the model, from a file"
    paper = "see `suite schedule optimize --help`"
    bench_options = ()  # a file is for one model, solver and number of steps
    effects = frozenset({"time-grid", "optimised-grid"})
    acting_options: ClassVar[dict[str, Any]] = {"file": "gaussian-flow-10"}

    def __post_init__(self) -> None:
        _ = self.content  # a file that is not there, or is no grid, is refused with the options

    @cached_property
    def content(self) -> grids.GridFile:
        """The file, read once."""
        return grids.read(self.file)

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        wanted = grids.stamp_of(folder, recipe)
        if different := self.content.stamp.differences(wanted):
            assert recipe.solver is not None
            raise ConfigError(
                f"grid {self.file} was fitted to {'; '.join(different)}; fit one with `suite schedule optimize "
                f"{folder.fact('modality')} --model {folder.name} --solver {recipe.solver} --steps {recipe.steps}`"
            )

    @hookimpl
    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        from suite.diffusion.noise import from_config

        if run.mode != "sample":
            raise ConfigError(f"grid {self.file} is for sampling; {run.modality} draws its times at random")
        described = self.content.noise
        if described is not None and from_config(described) != noise:
            raise ConfigError(f"grid {self.file} was fitted to the noise {dict(described)}, not to {noise.family}")
        times = GivenTimes(self.content.times, self.file)
        times.timesteps(noise, run.steps)  # a wrong number of steps is refused here, before the model runs
        return times
