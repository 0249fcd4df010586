"""DM-NonUniform: the grid on which the solver amplifies the denoiser's errors least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.errors import ConfigError
from suite.fitting.grid_fit import Fitted, GridMethod, GridProblem
from suite.plugins.schedules.optimize._curves import check_range, ends

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver

#: Neighbouring stops keep at least this part of an even step in half log-SNR between them. The bound takes an error
#: to be the same wherever it enters, and so rewards multistep solvers for stops that nearly coincide, whose large
#: weights cancel.
CLOSEST = 0.3


class _NoNoise:
    """Answers every draw with zeros: the bound is about the deterministic part of a step."""

    def normal_like(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)


def amplifications(solver: Solver, times: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each answer of the denoiser enters the last state, and the time it was asked at.

    A solver of this suite is linear in the denoiser's answers. So it is run once, from 0, on a state that has an
    element for every evaluation, and evaluation j answers the unit vector j: the last state is the weights.

    Args:
        times: [n + 1], falling, with finite log-SNR.

    Returns:
        (weights [evaluations], times [evaluations]), float64.
    """
    import itertools

    import torch

    from suite.run import Run

    width = (solver.facts.evaluations + 2) * (len(times) - 1)  # some take more than they tell, away from the ends
    asked: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        answer = torch.zeros_like(x)
        answer[:, len(asked)] = 1
        asked.append(float(t))
        return answer

    x = torch.zeros(1, width, dtype=torch.float64)
    rng: Any = _NoNoise()
    state = solver.begin(Run("", "", steps=len(times) - 1), times)
    for t, s in itertools.pairwise(times):
        x, state = solver.step(denoise, x, t, s, state, rng)
    return x[0, : len(asked)], torch.tensor(asked, dtype=torch.float64)


def bound(solver: Solver, noise: NoiseSchedule, times: Tensor, error: Callable[[Tensor], Tensor]) -> float:
    """sum_j |weight_j| error(t_j) / sigma at the end: how far errors of that size can move the last state."""
    weights, asked = amplifications(solver, times)
    return float((weights.abs() * error(asked)).sum() / noise.sigma(times[-1]))


@dataclass(frozen=True)
class DM(GridMethod):
    """Xue 2024: minimise the bound on the solver's error over the half log-SNR of the inner stops.

    The paper writes the weights of multistep solvers of order 1 to 3 out; here the solver itself tells them, so it
    works for every solver that is linear in the denoiser's answers. Needs no evaluation of the network unless
    `error=model`.

    Args:
        error: of the denoiser at a level: `paper`, sigma^power / alpha, or `model`, measured on its samples.
        power: 2 in the authors' code.
        start: where the search starts: even in half log-SNR (`log-snr`, advised for pixels) or in time (`time`, for
            latents).
        high, low: sigma / alpha that stand for the prior and the data; 1 and 0 take their places.
        levels: times at which `error=model` is measured.
    """

    error: Literal["paper", "model"] = "paper"
    power: float = 2.0
    start: Literal["log-snr", "time"] = "log-snr"
    high: float = 50.0
    low: float = 0.02
    levels: int = 24

    summary = "DM-NonUniform: the grid on which this solver amplifies the denoiser's errors least"
    paper = "DM-NonUniform (2402.17376), section 3"

    def __post_init__(self) -> None:
        check_range("dm", self.high, self.low)
        if not 0.5 <= self.power <= 4:
            raise ConfigError(f"dm: power = {self.power}: expected a number from 0.5 to 4")
        if not 8 <= self.levels <= 4096:
            raise ConfigError(f"dm: levels = {self.levels}: expected 8 to 4096")

    def fit(self, problem: GridProblem) -> Fitted:
        import numpy as np
        import torch
        from scipy.optimize import LinearConstraint, minimize

        noise, solver, steps = problem.noise, problem.solver, problem.steps
        if noise.discrete:
            raise ConfigError("dm bounds the error of a solver of real vectors; for a token model use --method dp")
        first, last = (end / 2 for end in ends(noise, self.high, self.low))
        high, low = noise.time_at(2 * torch.tensor([first, last], dtype=torch.float64)).tolist()
        error = self._error(problem)

        def objective(inner: np.ndarray) -> float:
            lam = torch.tensor([first, *inner, last], dtype=torch.float64)
            return bound(solver, noise, noise.time_at(2 * lam), error)

        even = np.linspace(first, last, steps + 1)[1:-1]
        in_time = (noise.log_snr(torch.linspace(high, low, steps + 1, dtype=torch.float64)) / 2).numpy()[1:-1]
        start = even if self.start == "log-snr" else in_time
        gap = CLOSEST * (last - first) / steps
        differences = np.eye(steps, steps - 1) - np.eye(steps, steps - 1, -1)
        offset = np.zeros(steps)
        offset[0], offset[-1] = -first, last
        ordered = LinearConstraint(differences, gap - offset, np.inf)  # pyright: ignore[reportArgumentType]
        found = minimize(objective, start, method="SLSQP", constraints=[ordered], options={"maxiter": 200})
        # The optimiser may stop at a point that is no better: then what it started from is the answer.
        starts = {"log-snr": even, "time": in_time, "found": found.x}
        values = {name: objective(inner) for name, inner in starts.items() if (np.diff(inner) > 0).all()}
        best = min(values, key=lambda name: values[name])
        inner = noise.time_at(2 * torch.tensor(starts[best], dtype=torch.float64)).tolist()
        return Fitted([1.0, *inner, 0.0], values[best], {"bounds": values})

    def _error(self, problem: GridProblem) -> Callable[[Tensor], Tensor]:
        """t -> size of the denoiser's error there."""
        import numpy as np
        import torch

        from suite.plugins.schedules.optimize._curves import errors, nodes

        noise = problem.noise
        if self.error == "paper":
            return lambda t: noise.sigma(t) ** self.power / noise.alpha(t)
        times = nodes(noise, self.levels, self.high, self.low)[1:]
        lam, size = noise.log_snr(times).numpy(), errors(problem, times).sqrt().log().numpy()

        def measured(t: Tensor) -> Tensor:
            return torch.from_numpy(np.exp(np.interp(noise.log_snr(t).numpy(), lam, size)))

        return measured
