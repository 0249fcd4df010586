"""Targets whose denoisers are known exactly, in float64, for every noise schedule.

Each target has `denoiser(noise)`, which returns E[x0 given x_t = x] as a solver sees it. Against these, order
of accuracy, variance and exactness are facts, not impressions.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from suite.diffusion.noise import NoiseSchedule, as_time
from suite.diffusion.prediction import Prediction, from_x0
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver, SolverFacts, expand, transfer
from suite.run import Run

Output = Callable[[Tensor, Tensor], Tensor]


class Target(ABC):
    """A distribution of continuous data."""

    @abstractmethod
    def denoiser(self, noise: NoiseSchedule) -> Denoise:
        """(x, t) -> E[x0 given x_t = x]."""

    @abstractmethod
    def flow_map(self, noise: NoiseSchedule, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Where the probability flow takes x from time t to time s; exact."""

    def output(self, noise: NoiseSchedule, kind: Prediction) -> Output:
        """(x, t) -> what a perfect network of this kind would answer; needs sigma_t > 0."""
        denoise = self.denoiser(noise)

        def output(x: Tensor, t: Tensor) -> Tensor:
            return from_x0(kind, denoise(x, t), x, expand(noise.alpha(t), x), expand(noise.sigma(t), x))

        return output

    def score(self, noise: NoiseSchedule) -> Output:
        """(x, t) -> gradient of log p_t at x, which is -epsilon / sigma_t."""
        epsilon = self.output(noise, Prediction.EPSILON)
        return lambda x, t: -epsilon(x, t) / expand(noise.sigma(t), x)


@dataclass(frozen=True)
class Gaussian(Target):
    """Every element is N(mean, variance), independently."""

    mean: float = 0.7
    variance: float = 0.25

    def marginal(self, noise: NoiseSchedule, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and variance of an element of x_t."""
        alpha, sigma = noise.alpha(t), noise.sigma(t)
        return alpha * self.mean, alpha**2 * self.variance + sigma**2

    def denoiser(self, noise: NoiseSchedule) -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            mean, variance = self.marginal(noise, t)
            gain = noise.alpha(t) * self.variance / variance
            return self.mean + expand(gain, x) * (x - expand(mean, x))

        return denoise

    def score(self, noise: NoiseSchedule) -> Output:
        def score(x: Tensor, t: Tensor) -> Tensor:
            mean, variance = self.marginal(noise, t)
            return -(x - expand(mean, x)) / expand(variance, x)

        return score

    def flow_map(self, noise: NoiseSchedule, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Where the probability flow takes x from time t to time s: deviations scale with the deviation of p_t."""
        (mean_t, variance_t), (mean_s, variance_s) = self.marginal(noise, t), self.marginal(noise, s)
        return expand(mean_s, x) + expand((variance_s / variance_t).sqrt(), x) * (x - expand(mean_t, x))


class PointMass(Gaussian):
    """All data at `value`: the denoiser is constant."""

    def __init__(self, value: float = 0.7) -> None:
        super().__init__(value, 0.0)


@dataclass(frozen=True)
class Mixture(Target):
    """A mixture of isotropic Gaussians over whole samples.

    Attributes:
        weights: [K], summing to 1.
        means: [K, *shape of a sample].
        variances: [K].
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    @staticmethod
    def two(shape: Sequence[int] = (1,)) -> Mixture:
        """Unequal weights and widths, so that nothing cancels by symmetry."""
        means = torch.stack([torch.full(tuple(shape), value, dtype=torch.float64) for value in (-1.0, 0.8)])
        weights = torch.tensor([0.35, 0.65], dtype=torch.float64)
        return Mixture(weights, means, torch.tensor([0.05, 0.2], dtype=torch.float64))

    def denoiser(self, noise: NoiseSchedule) -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            y = x.double()[:, None]
            size = y[0, 0].numel()
            per_component = (-1, self.weights.shape[0], *[1] * (x.ndim - 1))
            alpha, sigma = (as_time(v).reshape(-1, 1) for v in (noise.alpha(t), noise.sigma(t)))
            variance = alpha**2 * self.variances + sigma**2  # [B or 1, K]
            away = y - alpha.reshape(-1, *[1] * x.ndim) * self.means
            distance = away.flatten(2).square().sum(-1)
            belief = (self.weights.log() - 0.5 * (distance / variance + size * variance.log())).softmax(1)
            gain = (alpha * self.variances / variance).reshape(per_component)
            each = self.means + gain * away
            return (belief.reshape(per_component) * each).sum(1).to(x.dtype)

        return denoise

    def flow_map(self, noise: NoiseSchedule, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """In one dimension the flow keeps the part of all mass that lies below x, so it is a map of quantiles.

        Args:
            noise: any continuous family.
            x: [B, 1] float64.
            t, s: scalar times, in any order.

        Raises:
            ValueError: samples of more than one dimension, whose flow is not known in closed form.
        """
        if self.means[0].numel() != 1:
            raise ValueError("the exact flow of a mixture is known for samples of one element; use `reference`")

        def below(x: Tensor, u: Tensor | float) -> Tensor:
            alpha, sigma = noise.alpha(u), noise.sigma(u)
            deviation = (alpha**2 * self.variances + sigma**2).sqrt()
            return (self.weights * torch.special.ndtr((x - alpha * self.means.flatten()) / deviation)).sum(-1, True)

        part = below(x, t)
        reach = 40 * (noise.alpha(s) + noise.sigma(s)) * (1 + self.means.abs().max())
        low, high = torch.full_like(x, -float(reach)), torch.full_like(x, float(reach))
        for _ in range(70):  # bisection: 70 halvings of the bracket are below float64's own step
            middle = (low + high) / 2
            less = below(middle, s) < part
            low, high = middle.where(less, low), high.where(less, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class Tokens:
    """Independent tokens with known probabilities.

    Attributes:
        probabilities: [L, V] of the clean tokens; 0 for the mask.
        mask_token: index of the mask, or None for uniform noise.
    """

    probabilities: Tensor
    mask_token: int | None = None

    @staticmethod
    def random(length: int = 6, vocabulary: int = 5, masked: bool = True, seed: int = 0) -> Tokens:
        """Random probabilities; the mask, if any, is the last token."""
        generator = torch.Generator().manual_seed(seed)
        p = torch.rand(length, vocabulary, generator=generator, dtype=torch.float64) + 0.1
        if masked:
            p[:, -1] = 0
        return Tokens(p / p.sum(-1, keepdim=True), vocabulary - 1 if masked else None)

    def prior(self, rng: SampleRng) -> Tensor:
        """Tokens at t = 1."""
        length, vocabulary = self.probabilities.shape
        if self.mask_token is not None:
            return torch.full((len(rng.seeds), length), self.mask_token)
        return (rng.uniform((length,)) * vocabulary).long().clamp(max=vocabulary - 1)

    def denoiser(self, noise: NoiseSchedule) -> Denoise:
        """(tokens [B, L], t) -> p(x0 given x_t) [B, L, V], exactly, by Bayes' rule."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            vocabulary = self.probabilities.shape[-1]
            seen = torch.nn.functional.one_hot(x, vocabulary).to(self.probabilities)
            if self.mask_token is not None:
                return torch.where((x == self.mask_token)[..., None], self.probabilities, seen)
            alpha = expand(noise.alpha(t), seen)
            posterior = self.probabilities * (alpha * seen + (1 - alpha) / vocabulary)
            return posterior / posterior.sum(-1, keepdim=True)

        return denoise


class CellRng(SampleRng):
    """Uniform numbers at the middle of every cell of a partition of the unit cube, one row a cell.

    Attributes:
        cells: for each call of `uniform` in turn, how finely each number of a row is divided.
    """

    def __init__(self, cells: Sequence[Sequence[int]]) -> None:
        self.cells = [tuple(call) for call in cells]
        sizes = [n for call in self.cells for n in call]
        self.seeds = tuple(range(math.prod(sizes)))
        rest, columns = torch.arange(len(self.seeds)), []
        for n in sizes:
            columns.append((rest % n + 0.5) / n)
            rest = rest // n
        self._numbers = torch.stack(columns, 1).double()
        self._call = 0

    def uniform(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        first, count = sum(map(len, self.cells[: self._call])), len(self.cells[self._call])
        self._call += 1
        out = self._numbers[:, first : first + count].reshape(len(self.seeds), *shape)
        return out if like is None else out.to(like)


def law(sample: Callable[[SampleRng], Tensor], cells: Sequence[Sequence[int]]) -> dict[tuple[int, ...], float]:
    """The exact distribution of a sampler's tokens, without sampling.

    A sampler of tokens compares its uniform numbers with chances. Where these are multiples of 1 / cells, every
    number of a cell leads to the same tokens, and the cells have equal weight.

    Args:
        sample: from a stream of uniform numbers, a row a cell, to tokens [rows, L].
        cells: see `CellRng`; a number that decides nothing needs one cell.
    """
    rows, counts = sample(CellRng(cells)).unique(dim=0, return_counts=True)
    total = int(counts.sum())
    return {tuple(row): count / total for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}


@dataclass(frozen=True)
class Euler(Solver):
    """The plain first-order step, for tests that need some solver."""

    noise: NoiseSchedule
    facts = SolverFacts(order=1)

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: object, rng: SampleRng
    ) -> tuple[Tensor, object]:
        del rng
        return transfer(self.noise, x, denoise(x, t), t, s), state


def a_run(**facts: object) -> Run:
    """A `Run` for tests, with any of its facts replaced."""
    return Run(**{"modality": "image", "model": "oracle", "run_id": "test", **facts})  # pyright: ignore[reportArgumentType]


def drive(
    solver: Solver,
    times: Tensor,
    denoise: Denoise,
    x: Tensor,
    seeds: Sequence[int] | None = None,
    rng: SampleRng | None = None,
) -> Tensor:
    """x at the last of `times`: the plain loop, in x's dtype, without an engine."""
    steps = times.shape[0] - 1
    rng = rng or SampleRng(tuple(seeds) if seeds is not None else tuple(range(x.shape[0])))
    run = a_run(steps=steps, batch=x.shape[0], seeds=rng.seeds)
    state = solver.begin(run, times)
    if isinstance(solver, AdaptiveSolver):
        return solver.solve(denoise, x, times[0], times[-1], solver.evaluations(steps), rng)
    for t, s in itertools.pairwise(times):
        x, state = solver.step(denoise, x, t, s, state, rng)
    return x


def log_snr_times(noise: NoiseSchedule, steps: int, first: float = -4.0, last: float = 4.0) -> Tensor:
    """[steps + 1] times between two log-SNR values, equally spaced in it: the interior of every schedule."""
    return noise.time_at(torch.linspace(first, last, steps + 1, dtype=torch.float64))


def reference(target: Target, noise: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, steps: int = 1000) -> Tensor:
    """The probability flow from t to s by RK4 in half log-SNR, where y = x / alpha obeys dy/dlam = x0 - y."""
    denoise = target.denoiser(noise)
    ends = (float(noise.log_snr(t)) / 2, float(noise.log_snr(s)) / 2)
    lams = torch.linspace(*ends, 2 * steps + 1, dtype=torch.float64)
    times = noise.time_at(2 * lams)

    def slope(y: Tensor, index: int) -> Tensor:
        return denoise(noise.alpha(times[index]) * y, times[index]) - y

    y, h = x / noise.alpha(t), float(lams[2] - lams[0])
    for k in range(0, 2 * steps, 2):
        a = slope(y, k)
        b = slope(y + h / 2 * a, k + 1)
        c = slope(y + h / 2 * b, k + 1)
        d = slope(y + h * c, k + 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + d)
    return y * noise.alpha(s)


def errors(
    solver: Solver,
    noise: NoiseSchedule,
    target: Target,
    steps: Sequence[int],
    x: Tensor | None = None,
    ends: tuple[float, float] = (-4.0, 4.0),
) -> list[float]:
    """Largest error at the end of the interior, for each number of steps, against the exact flow.

    A multistep solver is given exact starting values, as its order is defined: in its first order - 1 steps it is
    told the denoiser's answers along the exact flow, and then the state, and the one it keeps for a corrector, is
    put right. So steps of lower order, taken while there is no history, do not count.

    Args:
        solver: deterministic.
        noise, target: of the oracle.
        steps: numbers of steps.
        x: [B, 1] starts in units of sigma.
        ends: log-SNR at the first and at the last time.
    """
    given = solver.facts.order - 1 if solver.facts.multistep else 0
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] if x is None else x
    denoise, rng, out = target.denoiser(noise), SampleRng(range(len(x))), []
    for count in steps:
        times = log_snr_times(noise, count, *ends)
        first = x * expand(noise.sigma(times[0]), x)

        def exact(t: Tensor, first: Tensor = first, begin: Tensor = times[0]) -> Tensor:
            return target.flow_map(noise, first, begin, t)

        def along(x: Tensor, t: Tensor, exact: Callable[[Tensor], Tensor] = exact) -> Tensor:
            del x
            return denoise(exact(t), t)

        state, got = solver.begin(a_run(steps=count), times), first
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            got, state = solver.step(along if index < given else denoise, got, t, s, state, rng)
            if index < given:
                got = exact(s)
                if is_dataclass(state) and not isinstance(state, type) and hasattr(state, "x"):
                    state = replace(state, x=exact(t))
        out.append(float((got - exact(times[-1])).abs().max()))
    return out


def slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Observed order: minus the slope of log(error) over log(steps), by least squares."""
    a = torch.tensor([[float(n)] for n in steps], dtype=torch.float64).log()
    a = torch.cat([a, torch.ones_like(a)], 1)
    b = torch.tensor([[v] for v in values], dtype=torch.float64).log()
    return -float(torch.linalg.lstsq(a, b).solution[0, 0])


def observed_order(
    solver_factory: Callable[[NoiseSchedule], Solver],
    noise: NoiseSchedule,
    steps: Sequence[int] = (80, 160, 320, 640),
    target: Target | None = None,
    ends: tuple[float, float] = (-4.0, 4.0),
) -> float:
    """Order of convergence on data whose flow is known, on a log-SNR grid between interior times.

    A deterministic solver is measured on the states it reaches, a stochastic one on the mean and the
    variance of its samples, which its affine steps determine without any sampling.

    Raises:
        ValueError: a stochastic solver on a target that is not Gaussian, where its steps are not affine.
    """
    target = target or Gaussian()
    solver = solver_factory(noise)
    if not solver.facts.stochastic:
        return slope(steps, errors(solver, noise, target, steps, ends=ends))
    if not isinstance(target, Gaussian):
        raise ValueError(f"{type(solver).__name__} draws noise: its order in law is measured on a Gaussian")
    values = []
    for count in steps:
        times = log_snr_times(noise, count, *ends)
        start, exact = target.marginal(noise, times[0]), target.marginal(noise, times[-1])
        got = moments(solver, times, target.denoiser(noise), *start)
        values.append(float(sum((g - e).abs() for g, e in zip(got, exact, strict=True))))
    return slope(steps, values)


@dataclass
class ProbeRng(SampleRng):
    """Answers draw number `one` with ones and all others with zeros; counts the draws.

    With `one` = "rows" draw k is one in row `first` + k and zero elsewhere, so that one run probes every draw.
    """

    one: int | Literal["rows"] | None = None
    first: int = 0
    draws: int = 0
    seeds: tuple[int, ...] = field(default=(0,))

    def normal(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        out = torch.zeros(len(self.seeds), *shape, dtype=torch.float64)
        if self.one == "rows":
            out[self.first + self.draws] = 1.0
        elif self.draws == self.one:
            out += 1.0
        self.draws += 1
        return out if like is None else out.to(like)


def affine_step(solver: Solver, denoise: Denoise, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, variance): on Gaussian data a step without history gives x_s = a x + b + noise of that variance.

    Found by probing with x = 0, with x = 1, and with each draw of noise alone.
    """
    state = solver.init(a_run())
    a, b, noise = _probed(solver, lambda x, rng: solver.step(denoise, x, t, s, state, rng)[0])
    return a, b, noise.square().sum()


def affine_run(solver: Solver, times: Tensor, denoise: Denoise) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, [draws] c): on Gaussian data a run over `times` gives a x + b + sum_k c_k z_k, z_k standard normal.

    All in one run, whose rows differ in their start and in the draw that is not zero. History is carried along, so
    this holds for multistep solvers too; it needs `SolverFacts.affine`.
    """
    return _probed(solver, lambda x, rng: drive(solver, times, denoise, x, rng=rng))


def _probed(solver: Solver, once: Callable[[Tensor, ProbeRng], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """See `affine_run`; `once` goes from a start and a stream to the end."""
    if not solver.facts.affine:
        raise ValueError(f"{type(solver).__name__} is not affine: its samples' law is not given by probes")
    counting = ProbeRng()
    once(torch.zeros(1, 1, dtype=torch.float64), counting)
    start = torch.zeros(2 + counting.draws, 1, dtype=torch.float64)
    start[1] = 1.0
    rng = ProbeRng(one="rows", first=2, seeds=tuple(range(len(start))))
    out = once(start, rng)[:, 0]
    return out[1] - out[0], out[0], out[2:] - out[0]


def moments(solver: Solver, times: Tensor, denoise: Denoise, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance at the last of `times` of an affine solver's samples; no sampling."""
    a, b, noise = affine_run(solver, times, denoise)
    return a * mean + b, a**2 * variance + noise.square().sum()
