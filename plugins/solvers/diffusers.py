"""Any scheduler of diffusers as a solver, on our grid and our noise schedule: the reference to compare with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

#: Evaluate twice a step, but the last.
TWICE = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
#: Keep nothing from one step for the next.
ONE_STEP = TWICE | {
    "DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler",
}  # fmt: skip
DRAWS = {
    "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler",
}  # fmt: skip
#: What its class says where its option `solver_order` is not given, or has no such option; 1 for those not named.
ORDERS = {
    **dict.fromkeys(TWICE, 2), "KDPM2AncestralDiscreteScheduler": 1, "PNDMScheduler": 2,
    "DEISMultistepScheduler": 2, "DPMSolverMultistepScheduler": 2, "DPMSolverSinglestepScheduler": 2,
    "UniPCMultistepScheduler": 2, "SASolverScheduler": 2,
}  # fmt: skip


@dataclass(frozen=True)
class DiffusersSolver(Solver):
    """Steps a copy of the scheduler, which is the state; tables are double precision where the class allows it."""

    noise: NoiseSchedule
    name: str
    config: tuple[tuple[str, str], ...]
    eta: float
    facts: SolverFacts  # pyright: ignore[reportIncompatibleVariableOverride]

    def init(self, run: Run) -> Any:
        raise ConfigError(f"diffusers: {self.name} must know the whole grid; it cannot invert or guide a distillation")

    def begin(self, run: Run, times: Tensor) -> Any:
        from suite.plugins.solvers._diffusers import prepare

        del run
        check_grid(self.facts, times)
        return prepare(self.name, dict(self.config), self.noise, times)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        from suite.plugins.solvers._diffusers import advance

        return advance(state, self.noise, denoise, x, t, s, rng, {"eta": self.eta})

    def evaluations(self, steps: int) -> int:
        """2n - 1 for classes that evaluate twice, n + 1 for PNDM, which takes its first step twice, else n."""
        if self.name in TWICE:
            return 2 * steps - 1
        return steps + (self.name == "PNDMScheduler")


@dataclass(frozen=True)
class Diffusers(Plugin):
    """`diffusers:name=EulerDiscreteScheduler`, with options of that class in `config`.

    `config=solver_order=3/algorithm_type=sde-dpmsolver++` passes two. The class is given this model's noise and the
    schedule plugin's grid, so its own options about betas and spacing must be left alone.

    Args:
        name: a scheduler class of diffusers.
        config: options of that class, `key=value` separated by `/`.
        eta: of classes whose step takes it (DDIM).
    """

    name: str = "DDIMScheduler"
    config: tuple[str, ...] = ()
    eta: float = 0.0

    summary = "any scheduler of diffusers, on our grid: diffusers:name=EulerDiscreteScheduler"
    paper = "diffusers 0.42, schedulers"
    orders = "1-3"
    bench_options = ()  # other methods of the suite, in another implementation

    def __post_init__(self) -> None:
        for item in self.config:
            key, equals, value = item.partition("=")
            if not (key and equals and value):
                raise ConfigError(f"diffusers: config = {item!r}: expected key=value, several separated by '/'")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"diffusers: eta = {self.eta}: expected a number from 0 to 1")
        if not self.name.isidentifier():
            raise ConfigError(f"diffusers: name = {self.name!r}: expected a class, like name=EulerDiscreteScheduler")

    @cached_property
    def _options(self) -> Mapping[str, str]:
        return dict(item.split("=", 1) for item in self.config)

    @property
    def _facts(self) -> SolverFacts:
        stochastic = (
            self.name in DRAWS
            or (self.eta > 0 and self.name != "EulerDiscreteScheduler")
            or self._options.get("algorithm_type", "").startswith("sde")
        )
        order = int(self._options.get("solver_order", ORDERS.get(self.name, 1)))
        evaluations = 2 if self.name in TWICE or self.name == "PNDMScheduler" else 1
        multistep = self.name not in ONE_STEP
        return SolverFacts(order, evaluations, stochastic=stochastic, multistep=multistep)

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._facts.words

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        try:
            importlib.import_module("diffusers")
        except ImportError:
            raise ConfigError("diffusers is not installed: pip install 'efficient-diffusion-suite[image]'") from None
        from suite.plugins.solvers._diffusers import find

        find(self.name, self._options)
        if noise.discrete:
            raise ConfigError(f"diffusers: {self.name} steps real vectors; a token model wants --solver mdlm")
        return DiffusersSolver(noise, self.name, tuple(self._options.items()), self.eta, self._facts)
