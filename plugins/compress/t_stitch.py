"""T-Stitch: a small network for the first steps, the model in use for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import NamesPath, Plugin

if TYPE_CHECKING:
    from suite.call import Call
    from suite.host.models import ModelFolder
    from suite.network import Network
    from suite.network.experts import Companions
    from suite.recipe import Recipe
    from suite.run import Run
    from suite.wrap import Wrap


@dataclass(frozen=True)
class TStitch(Plugin):
    """Pan 2024: denoisers of different size, trained on the same data, agree where there is mostly noise.

    Steps 0 .. round(share n) - 1 of n are the small network's, with all their evaluations and branches. The cost of
    a run is the sum of its steps' costs.

    Args:
        model: the small one: a shipped name or a folder, or `same` for the model in use itself. It must have the
            noise, shape, prediction, conditioning and vocabulary of the model in use.
        share: of the steps that it takes; 0 is none, 1 is all.
    """

    model: Annotated[str, NamesPath("models", ("same",))]
    share: float = 0.4

    summary = "a small network takes the first steps, the model in use the rest"
    paper = "T-Stitch (2402.14167), section 3"
    effects = frozenset({"denoiser-switch", "counts-steps"})
    noop_options: ClassVar[dict[str, Any]] = {"model": "same", "share": 0.0}
    acting_options: ClassVar[dict[str, Any]] = {"model": "same", "share": 0.4}

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("t-stitch: model is empty; write t-stitch:model=NAME_OR_FOLDER")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"t-stitch: share = {self.share}: expected a share of the steps in [0, 1]")

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        del recipe
        from suite.network.experts import companion_folder

        companion_folder(folder, self.model)

    @hookimpl
    def compress(self, network: Network, run: Run, companions: Companions) -> Wrap:
        del network, run
        from suite.network.experts import Expert
        from suite.plugins.compress._switching import switching, tally

        def early(call: Call) -> bool:
            return call.step < round(self.share * call.steps)

        expert = Expert(companions.open(self.model), early, tally())
        return switching([expert], f"share = {self.share:g} of the steps is none; take more")
