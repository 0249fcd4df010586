"""PeRFlow: straight lines in windows of time, for networks distilled to be straight in each window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suite.diffusion.solver import Denoise, Solver, SolverFacts, check_grid, combine, of_times, transfer_weights
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run

NEAR = 1e-9


@of_times
def weights(noise: NoiseSchedule, windows: Tensor | int, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Weights of x and x0 in x + (s - t) / (end - t) (x_end - x), the line of t's window (Yan 2024, section 3.2).

    The window goes from `first` to `end`. With a = alpha_first / alpha_end and p the part of the window behind t,
    x_end = (x + (1 - p) (a sigma_end - sigma_first) eps) / ((1 - p) a + p): the line through DDIM's transfer by eps.
    """
    import torch

    end = ((t * windows).sub(NEAR).floor() / windows).clamp(min=0)
    first = (end + 1 / windows).clamp(max=1)
    p = ((first - t) / (first - end)).clamp(min=0)
    p = p.where(p > NEAR, 0.0)
    a = noise.alpha(first) / noise.alpha(end)
    base = (1 - p) * a + p
    of_x, of_epsilon = 1 / base, (1 - p) * (a * noise.sigma(end) - noise.sigma(first)) / base
    # epsilon = (x - alpha x0) / sigma
    of_x, of_x0 = of_x + of_epsilon / noise.sigma(t), -of_epsilon * noise.alpha(t) / noise.sigma(t)
    direct = (torch.as_tensor(w, dtype=torch.float64) for w in transfer_weights(noise, t, end))
    of_x, of_x0 = (w.where(p > 0, d) for w, d in zip((of_x, of_x0), direct, strict=True))
    part = (t - s) / (t - end)
    return 1 - part + part * of_x, part * of_x0


@dataclass(frozen=True)
class PeRFlowSolver(Solver):
    """Steps along the straight line of each window; every window's end must be a stop.

    With flow noise the line is DDIM's own, whatever the windows. In other families a line in x is not the flow of
    one epsilon, and a network that is not straight in its windows is not followed better by more steps.
    """

    noise: NoiseSchedule
    windows: int

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        straight = abs(float(self.noise.alpha(0.25)) - 0.75) + abs(float(self.noise.sigma(0.25)) - 0.25) < NEAR
        return SolverFacts(order=1 if straight else 0, min_steps=self.windows, exact=straight)

    def begin(self, run: Run, times: Tensor) -> Any:
        check_grid(self.facts, times)
        ends = [k / self.windows for k in range(1, self.windows)]
        grid = times.reshape(times.shape[0], -1)
        for end in ends:
            inside = (grid[0] > end) & (grid[-1] < end)
            if bool((inside & ((grid - end).abs() > NEAR).all(0)).any()):
                raise ConfigError(
                    f"perflow: {self.windows} windows end at {', '.join(f'{e:.3g}' for e in ends)}, and the grid does "
                    f"not stop at {end:.3g}: use --schedule uniform with a multiple of {self.windows} steps"
                )
        return self.init(run)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        del rng
        return combine(weights(self.noise, self.windows, t, s), (x, denoise(x, t))), state


@dataclass(frozen=True)
class PeRFlow(Plugin):
    """Yan 2024, section 3.

    Args:
        windows: how many equal windows of [0, 1] the network was trained with; 4 in the published models.
    """

    windows: int = 4

    summary = "PeRFlow: straight lines in windows of time, for networks distilled to them"
    paper = "PeRFlow (2405.07510), section 3"
    orders = "0-1"
    #: The kit's grids have no stops at the ends of four windows.
    acting_options: ClassVar[dict[str, Any]] = {"windows": 1}

    def __post_init__(self) -> None:
        if not 1 <= self.windows <= 100:
            raise ConfigError(f"perflow: windows = {self.windows}: expected a whole number from 1 to 100")

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        return PeRFlowSolver(noise, self.windows)
