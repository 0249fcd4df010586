"""Fitting a grid to a model: the problem that every method gets, and what a method is.

A method is a frozen dataclass of options below `GridMethod`, registered as an entry point of the group
`suite.grids`. It is looked up by name like a plugin, and like a plugin's its module must load without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from suite.diffusion.denoiser import Counter
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.sampler import Problem
    from suite.diffusion.solver import Denoise, Solver
    from suite.engine.engine import Engine

GRIDS = "suite.grids"
"""Entry-point group of the methods."""


@dataclass(frozen=True)
class Fitted:
    """What a method found.

    Attributes:
        times: steps + 1 times from 1 to 0.
        objective: what it made small.
        facts: further numbers, JSON-able.
    """

    times: Sequence[float]
    objective: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class GridMethod(ABC):
    """A way to fit a grid. Class attributes: `summary`, `paper`; `tokens`: it serves token models too;
    `deterministic`: it compares samples with a reference of the same seed, so the solver must not draw noise.
    """

    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    tokens: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False

    @abstractmethod
    def fit(self, problem: GridProblem) -> Fitted:
        """The grid for this problem."""


class GridProblem(Protocol):
    """A model with noise schedule, solver and number of steps, and means to measure it.

    Attributes:
        noise, solver, steps: what the grid is for.
        own: [steps + 1] times of the recipe's own schedule, which a fitted grid should beat.
        mask_token: of a token model.
    """

    noise: NoiseSchedule
    solver: Solver
    steps: int
    own: Tensor
    mask_token: int | None

    def passes(self, title: str, calls: int) -> Iterator[tuple[Tensor, Denoise, torch.Generator]]:
        """Clean samples [B, ...] in parts, each with a fresh guided denoiser for it and a generator on the CPU.

        The samples are the model's own, from many even steps. `calls` is how often the denoiser will be asked for
        each part; it must be asked from noisy to clean, as in sampling, for models that remember their last answer.
        """
        ...

    def error(self, times: Tensor) -> float:
        """Distance of the solver's samples on a grid from those of many steps, over the size of these.

        From the same seeds as the clean samples; root mean square over all elements.
        """
        ...


@dataclass
class ModelProblem:
    """`GridProblem` of a loaded engine. The plugins of the recipe that act once a load are in force, caches are not.

    Attributes:
        engine, prompts, seeds: one sample a prompt and seed.
        batch: samples evaluated at once.
        reference: even steps of the reference.
        on_call: called with (title, calls done, calls in all) after each evaluation.
        clean: samples of the same seeds that count as exact, in parts as `batch` makes them; None is the problem's
            own solver on `reference` even steps.
    """

    engine: Engine
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int = 8
    reference: int = 100
    on_call: Callable[[str, int, int], None] = lambda title, done, total: None
    clean: Sequence[Tensor] | None = None
    counter: Counter = field(init=False)

    def __post_init__(self) -> None:
        from suite.diffusion.denoiser import Counter

        self.counter = Counter()
        probe = self._problem(slice(0, 1))
        self.noise, self.solver, self.run, self.steps = probe.noise, probe.solver, probe.run, probe.run.steps
        self.own = probe.times
        self.mask_token = self.engine.modality.mask_token

    @property
    def _parts(self) -> list[slice]:
        return [slice(at, at + self.batch) for at in range(0, len(self.seeds), self.batch)]

    def _problem(self, part: slice) -> Problem:
        return self.engine.problem(self.prompts[part], self.seeds[part], self.counter)

    def sample(self, title: str, times: Tensor) -> list[Tensor]:
        """The solver's samples on a grid, in parts."""
        import torch

        from suite.diffusion.sampler import march

        out, calls = [], (len(times) - 1) * len(self._parts)
        for number, part in enumerate(self._parts):
            done = number * (len(times) - 1)
            problem = self._problem(part)
            problem = replace(
                problem,
                times=times,
                run=replace(problem.run, steps=len(times) - 1),
                on_step=lambda progress, done=done: self.on_call(title, done + progress.step + 1, calls),
            )
            with torch.inference_mode():
                out.append(march(problem))
        return out

    def samples(self) -> Sequence[Tensor]:
        """The reference's samples in parts; made once."""
        import torch

        from suite.diffusion.schedule import above_end

        if self.clean is None:
            even = above_end(self.noise, torch.linspace(1, 0, self.reference + 1, dtype=torch.float64))
            self.clean = self.sample("reference", even)
        return self.clean

    def passes(self, title: str, calls: int) -> Iterator[tuple[Tensor, Denoise, torch.Generator]]:
        """See `GridProblem`."""
        import torch

        from suite.call import Call

        total = calls * len(self._parts)
        for number, (part, x0) in enumerate(zip(self._parts, self.samples(), strict=True)):
            problem, step = self._problem(part), 0

            def denoise(x: Tensor, t: Tensor, problem: Problem = problem, number: int = number) -> Tensor:
                nonlocal step
                call = Call(step, calls, float(t), float(t), 0, "cond", problem.run.run_id)
                with torch.inference_mode():
                    out = problem.denoiser.denoise(x, t, problem.cond, call)
                step += 1
                self.on_call(title, number * calls + step, total)
                return out

            seed = hash_seed(self.seeds[part])
            yield x0, denoise, torch.Generator().manual_seed(seed)

    def error(self, times: Tensor) -> float:
        """See `GridProblem`."""
        clean = self.samples()
        return relative_error(self.sample("sampling", times), clean)[0]


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float | None]:
    """Root mean square distance over root mean square size, and its standard error over the samples.

    The standard error is the jackknife's; None of a single sample. Tokens have the share that differs instead.

    Args:
        got, exact: samples [B, ...] in equal parts.
    """
    import torch

    pairs = list(zip(got, exact, strict=True))
    tokens = not exact[0].is_floating_point()
    if tokens:
        away = torch.cat([(g != e).double().flatten(1).mean(1) for g, e in pairs])
        size = torch.ones_like(away)
    else:
        away = torch.cat([(g.double() - e.double()).square().flatten(1).sum(1) for g, e in pairs])
        size = torch.cat([e.double().square().flatten(1).sum(1) for _, e in pairs])
    power, count = 1.0 if tokens else 0.5, len(away)
    error = float(away.sum() / size.sum()) ** power
    if count < 2:
        return error, None
    without = ((away.sum() - away).clamp(min=0) / (size.sum() - size)) ** power
    return error, float(((count - 1) * without.var(correction=0)).sqrt())


def hash_seed(seeds: Sequence[int]) -> int:
    """A seed for the noise that samples of these seeds are shown, apart from what they began with."""
    return 7919 + sum((1 + k) * s for k, s in enumerate(seeds))
