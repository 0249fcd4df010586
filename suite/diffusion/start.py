"""`Start`: sampling that begins at a time below 1, from a prior of its own.

The reverse process may begin anywhere, if x there is drawn from something near the marginal p_t. What is known
already decides what that is: a picture that is noised (SDEdit, CCDF), a generator's guess that is noised (ES-DDPM), a
model of x_t itself (TDPM, leapfrog, a normalizing flow, a Markov chain), or an observation that is noisy anyway (DDM2).
They differ in their `Prior` and in nothing else.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.files.inputs import MEDIA, check

if TYPE_CHECKING:  # files are checked before torch is loaded
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.sampler import Problem, Sampler
    from suite.modality import Modality

STRENGTH = 0.6
"""Share of the steps that are run after a file, unless one says otherwise."""

#: (noise, t, rng) -> x at time t, one row a stream; t is a scalar or [B, groups].
Prior = Callable[["NoiseSchedule", "Tensor", "SampleRng"], "Tensor"]


@dataclass(frozen=True)
class Init:
    """A file to begin with, read and checked; no torch here.

    Attributes:
        content: what `Modality.read` made of it.
        name: of the file, without its place.
        sha256: of its bytes.
        strength: share of the steps that are run.
        modality: for which it was read.
    """

    content: Any
    name: str
    sha256: str
    strength: float = STRENGTH
    modality: str = ""

    @staticmethod
    def of(modality: type[Modality], path: str | Path, strength: float | None = None) -> Init:
        """Read `path` for a modality, before any model is loaded.

        Raises:
            ConfigError: the modality has no such thing, the strength is no share, the file is missing, of another
                kind, or cannot be read.
        """
        path = Path(path)
        strength = STRENGTH if strength is None else strength
        if not modality.reads:
            raise ConfigError(f"--init {path}: the modality {modality.name} cannot begin with a file; leave it out")
        if not 0 <= strength <= 1:
            raise ConfigError(f"--strength {strength:g}: expected a number from 0 (the file) to 1 (nothing of it)")
        if path.suffix.lower() not in modality.reads:
            what = path.suffix or "a file without ending"
            raise ConfigError(
                f"--init {path}: {modality.name} cannot begin with {what}; expected {', '.join(modality.reads)}"
            )
        for file in files_of(path):
            check(file, "--init", MEDIA)
        try:
            return Init(modality.read(path), path.name, digest(path), float(strength), modality.name)
        except ConfigError as error:
            raise ConfigError(f"--init: {error}") from error
        except OSError as error:
            raise ConfigError(f"--init {path} cannot be read: {error.strerror or error}") from error

    def steps(self, steps: int) -> int:
        """How many of `steps` are run."""
        return share_of(steps, self.strength)


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files in a folder, by name."""
    return sorted(path.iterdir()) if os.path.isdir(path) else [path]


def digest(path: Path) -> str:
    """sha256 of a file, or of the files in a folder."""
    out = hashlib.sha256()
    for file in files_of(path):
        out.update(file.read_bytes())
    return out.hexdigest()


def share_of(steps: int, share: float) -> int:
    """How many of `steps` a share is: rounded down, but at least one if there is a share at all.

    Raises:
        ConfigError: one step cannot be cut.
    """
    if 0 < share < 1 and steps < 2:
        raise ConfigError(f"a share of {share:g} of 1 step is none; raise --steps, or take 0 or 1")
    # 1e-9: 0.7 of 10 are 7, although the product is rounded.
    return max(math.floor(share * steps + 1e-9), 1 if share > 0 else 0)


@dataclass(frozen=True)
class Start:
    """Begin at a time below 1.

    Attributes:
        prior: how x is drawn there.
        share: run the last `share_of(steps, share)` steps of the grid, or
        time: begin at exactly this time, and go on with the grid's times below it.
    """

    prior: Prior
    share: float | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.time is None):
            raise ConfigError("a start needs either a share of the steps or a time; give one of them")
        where = self.share if self.time is None else self.time
        if where is None or not 0 <= where <= 1:
            raise ConfigError(f"a start at {where}: expected a share or a time in [0, 1]")

    def times(self, grid: Tensor) -> Tensor:
        """The part of a grid that is left: [n + 1] or [n + 1, groups], n from 0 to the grid's steps."""
        import torch

        if self.share is not None:
            return grid[grid.shape[0] - 1 - share_of(grid.shape[0] - 1, self.share) :]
        assert self.time is not None
        if grid.ndim > 1:
            raise ConfigError("a start at a time needs a grid without groups; give a share of the steps")
        if self.time == 0:
            return grid[-1:]
        return torch.cat([grid.new_tensor([self.time]), grid[grid < self.time - 1e-9]])


def begin(problem: Problem, start: Start) -> Problem:
    """The same problem from the start on, with an empty history; the problem itself where nothing is cut off.

    Raises:
        ConfigError: it begins below 1 already, the prior does not fit, or the solver needs more steps.
    """
    from suite.diffusion.sampler import time_at

    steps = problem.times.shape[0] - 1
    if not steps or problem.times[0].max() < 1:
        raise ConfigError(
            f"sampling begins at t = {float(problem.times[0].max()):g} already, so there cannot be a second start; "
            "drop --init or the plugin that brings one"
        )
    times = start.times(problem.times)
    if times.shape[0] == problem.times.shape[0] and bool((times[0] == 1).all()):
        return problem  # the whole grid: the plain run, bit for bit
    left = times.shape[0] - 1
    if 0 < left < problem.solver.facts.min_steps:
        raise ConfigError(
            f"the start leaves {left} of {steps} steps, but the solver needs {problem.solver.facts.min_steps}; "
            "raise --steps or --strength"
        )
    cut = replace(problem, times=times, run=replace(problem.run, steps=left))
    x = start.prior(problem.noise, time_at(cut, 0), problem.rng)
    if x.shape != problem.x.shape:
        raise ConfigError(f"the start's prior gave {list(x.shape)}; expected {list(problem.x.shape)}")
    return replace(cut, x=x.to(problem.x))


def truncated(start: Start) -> Callable[[Sampler], Sampler]:
    """The sampler part of a `Wrap` that begins so."""
    return lambda inner: lambda problem: inner(begin(problem, start))


def noised(x0: Tensor | Callable[[SampleRng], Tensor], tokens: int | None = None) -> Prior:
    """What the forward process makes of x0, [1, ...] or [B, ...], or of what a generator makes of the streams.

    `tokens` is for discrete noise; see `diffuse`.

    SDEdit (2108.01073) with a guide, CCDF (2112.05146) with an estimate, ES-DDPM (2205.12524) with a generator.
    """

    def prior(noise: NoiseSchedule, t: Tensor, rng: SampleRng) -> Tensor:
        clean = x0(rng) if callable(x0) else x0
        clean = clean.expand(len(rng.seeds), *clean.shape[1:])
        return diffuse(noise, clean, t, rng, tokens)

    return prior


def diffuse(noise: NoiseSchedule, x0: Tensor, t: Tensor, rng: SampleRng, tokens: int | None = None) -> Tensor:
    """x_t ~ q(x_t given x0): alpha x0 + sigma eps; tokens stay with chance alpha, else are masked or drawn anew.

    Args:
        x0: [B, ...] one row a stream; tokens [B, L] for discrete noise.
        t: scalar, [B] or [B, groups].
        tokens: the mask's token for masked noise, the size of the vocabulary for uniform noise.
    """
    import torch

    from suite.diffusion.solver import expand

    if not noise.discrete:
        eps = rng.normal_like(x0)
        return expand(noise.alpha(t), x0) * x0 + expand(noise.sigma(t), x0) * eps
    if tokens is None:
        raise ConfigError(f"{noise.family} noise on tokens needs to know the mask, or the size of the vocabulary")
    alpha = noise.alpha(t)
    kept = rng.uniform(x0.shape[1:]) < (alpha if alpha.ndim == 0 else alpha.reshape(-1, 1))
    other = torch.full_like(x0, tokens)
    if noise.family == "uniform":
        other = (rng.uniform(x0.shape[1:]).double() * tokens).long().clamp(max=tokens - 1).to(x0.device)
    return torch.where(kept.to(x0.device), x0, other)


def observed(noise: NoiseSchedule, y: Tensor, level: float) -> Start:
    """Begin with data that are noisy already, y = x0 + level * eps: where sigma / alpha = level, alpha y is x_t.

    DDM2 (2302.03018), section 3.2, in continuous time.
    """
    from suite.diffusion.noise import as_time
    from suite.diffusion.solver import expand

    if not level > 0:
        raise ConfigError(f"noise of deviation {level}: expected a number above 0")
    time = float(noise.time_at(as_time(-2 * math.log(level))))

    def prior(noise: NoiseSchedule, t: Tensor, rng: SampleRng) -> Tensor:
        return expand(noise.alpha(t), y) * y.expand(len(rng.seeds), *y.shape[1:])

    return Start(prior, time=time)
