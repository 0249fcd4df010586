"""eDiff-I's experts: a network for each range of times."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import NamesPath, Plugin

if TYPE_CHECKING:
    from collections.abc import Callable

    from suite.call import Call
    from suite.host.models import ModelFolder
    from suite.network import Network
    from suite.network.experts import Companions
    from suite.recipe import Recipe
    from suite.run import Run
    from suite.wrap import Wrap


@dataclass(frozen=True)
class Experts(Plugin):
    """Balaji 2022: an ensemble of denoisers of which one is active an evaluation, so it costs what one costs.

    With bounds b_1 > b_2 > ..., model k answers where b_k < t <= b_(k-1) (b_0 = 1), and the model in use where t is
    at most the last bound. The time of an evaluation decides, so both evaluations of a Heun step find their expert.

    Args:
        models: shipped names or folders joined by `+`, from the noisiest range on; `same` is the model in use. They
            must have the noise, shape, prediction, conditioning and vocabulary of the model in use.
        bounds: the lower end of each one's range, in (0, 1), decreasing.
    """

    models: Annotated[str, NamesPath("models", ("same",))]
    bounds: tuple[float, ...]

    summary = "a network for each range of times; the model in use has the last"
    paper = "eDiff-I (2211.01324), section 4.1"
    effects = frozenset({"denoiser-switch"})
    acting_options: ClassVar[dict[str, Any]] = {"models": "same+same", "bounds": (0.7, 0.3)}

    def __post_init__(self) -> None:
        names = self.models.split("+")
        if not all(names) or len(names) != len(self.bounds):
            raise ConfigError(
                f"experts: models = {self.models!r} and {len(self.bounds)} bounds: expected one bound a model, e.g. "
                "experts:models=A+B,bounds=0.7/0.3"
            )
        if not all(0 < b < 1 for b in self.bounds) or any(a <= b for a, b in pairwise(self.bounds)):
            raise ConfigError(
                f"experts: bounds = {'/'.join(map(str, self.bounds))}: expected decreasing times in (0, 1)"
            )

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        del recipe
        from suite.network.experts import companion_folder

        for model in self.models.split("+"):
            companion_folder(folder, model)

    @hookimpl
    def compress(self, network: Network, run: Run, companions: Companions) -> Wrap:
        del network, run
        from suite.network.experts import Expert
        from suite.plugins.compress._switching import switching, tally

        def above(bound: float) -> Callable[[Call], bool]:
            return lambda call: call.t > bound

        # In this order: the first that takes a call answers it.
        pairs = zip(self.models.split("+"), self.bounds, strict=True)
        experts = [Expert(companions.open(model), above(bound), tally()) for model, bound in pairs]
        return switching(experts, f"no evaluation was at a time above {self.bounds[-1]:g}")
