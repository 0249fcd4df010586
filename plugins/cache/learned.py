"""Learning-to-Cache: a trained router says for every part and step whether it is computed or reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugins.cache._calibrated import Calibrated, CalibrationOption
from suite.plugins.cache._scheduled import UNIT, Scheduled, parts_of, table, wrap_of
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from suite.network import Network
    from suite.run import Run

NAME = "learned"


def routed(betas: Sequence[float | None], threshold: float) -> list[bool]:
    """Which steps reuse: those whose router is below the threshold. None is a step that is always computed."""
    return [beta is not None and beta < threshold for beta in betas]


@dataclass(frozen=True)
class Learned(Calibrated):
    """Ma 2024: at every second step each part is computed or not, as a trained router beta in [0, 1] has it.

    In training a part answers beta full + (1 - beta) cached. In use a part whose beta is below the threshold answers
    what it gave at the step before, and the others are computed: beta = 1 everywhere is the plain network, 0 is
    FORA with an interval of 2.

    Args:
        file: routers of this model and run, from `suite cache calibrate learned`, or the name of shipped ones; by
            default the shipped ones for the model and its number of steps.
        threshold: parts with a smaller beta are reused; 0 computes everything.

    Raises:
        ConfigError: no routers, or those of another model or run; from the hook, other parts.
    """

    file: CalibrationOption | None = None
    threshold: float = 0.5

    called = NAME
    summary = "reuse attention and MLPs at every second step where a trained router allows it"
    paper = "Learning-to-Cache (2406.01733), section 3.3"
    effects = frozenset({"block-outputs", "step-reuse"})
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0, "file": "learned-tiny-11"}
    acting_options: ClassVar[dict[str, Any]] = {"threshold": 0.5, "file": "learned-tiny-11"}

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"learned: threshold = {self.threshold}: expected 0 to 1, e.g. learned:threshold=0.5")

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        content = self.calibration(run)
        betas = table(content, self.source, "beta")
        parts = parts_of(network, NAME, betas)
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.5"))
        plan = {part: [routed(row, self.threshold) for row in rows] for part, rows in betas.items()}
        facts = {"error_estimate": content.made.get("error_routed")}
        return wrap_of(parts, Scheduled(content, plan), facts, f"no router is below threshold = {self.threshold:g}")
