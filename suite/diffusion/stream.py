"""Frames one after the other, steps of several frames in one batch: StreamDiffusion's loop (2312.12491).

A frame is noised to the first of n times and denoised in n steps. While frame i takes its first step, frame i - 1 takes
its second, and so on: one network call a frame instead of n, and every frame comes out as it would alone, n - 1 frames
later. It is no plugin: a plugin sees one run, and this is a run without an end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond, Denoiser, chosen
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import check_grid
from suite.diffusion.start import diffuse
from suite.errors import ConfigError

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.solver import Solver
    from suite.run import Run

Residual = Literal["none", "self", "once"]


@dataclass
class _Frame:
    """A frame on its way: its state, how many steps it has taken, its stream, and what guidance leads away from."""

    x: Tensor
    rng: SampleRng
    away: Tensor
    steps: int = 0


@dataclass
class FrameStream:
    """Denoises frames as they come.

    Attributes:
        denoiser: of one branch, as `Engine` has it below guidance.
        cond: conditioning of one row, the same for all frames.
        uncond: the same of the negative prompt; needed by residual="once" only.
        times: [n + 1] decreasing to 0; the first says how much of a frame is kept.
        residual: guidance without a second evaluation at every step (section 3.2, delta = 1): x0 is led away from the
            frame that came in (`self`, n evaluations a frame) or from the unconditional estimate at the first time
            (`once`, n + 1); `none` is no guidance.
        scale: of the guidance.
        seed: of all frames, which StreamDiffusion keeps so that the picture does not flicker; None counts up.
    """

    denoiser: Denoiser
    noise: NoiseSchedule
    solver: Solver
    times: Tensor
    cond: Cond
    run: Run
    uncond: Cond | None = None
    residual: Residual = "none"
    scale: float = 1.0
    seed: int | None = 0
    _under_way: list[_Frame] = field(default_factory=list, repr=False)
    _count: int = 0

    def __post_init__(self) -> None:
        facts = self.solver.facts
        if facts.adaptive or facts.multistep or facts.evaluations > 1 or facts.discrete:
            raise ConfigError(
                "a stream batch steps frames at different times together, so its solver must be a one-step solver of "
                f"real vectors with one evaluation; got one with {', '.join(sorted(facts.words)) or 'tokens'}"
            )
        if self.times.ndim != 1 or float(self.times[-1]) != 0:
            raise ConfigError(f"a stream needs times of shape [n + 1] that end at 0; got {tuple(self.times.shape)}")
        check_grid(facts, self.times)
        if self.residual == "once" and self.uncond is None:
            raise ConfigError("residual = 'once' evaluates the unconditional branch once a frame: give `uncond`")

    def frames(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """x0 [1, ...] of every frame [1, ...], in order; the last n - 1 come after the input has ended."""
        for frame in frames:
            yield from self.push(frame)
        while self._under_way:
            yield from self._advance()

    def push(self, frame: Tensor) -> list[Tensor]:
        """Take in one frame and step all that are under way once; the frame that is finished, if any."""
        rng = SampleRng([self._count if self.seed is None else self.seed])
        self._count += 1
        x = diffuse(self.noise, frame.float(), self.times[0], rng)
        away = frame.float()
        if self.residual == "once":
            assert self.uncond is not None
            away = self.denoiser.denoise(x, self.times[:1], self.uncond, self._call("uncond", 1))
        self._under_way.insert(0, _Frame(x, rng, away))
        return self._advance()

    def _advance(self) -> list[Tensor]:
        """One step of every frame, newest first, in one batch."""
        now = self._under_way
        where = torch.tensor([f.steps for f in now])
        t, s = self.times[where], self.times[where + 1]
        x, away = torch.cat([f.x for f in now]), torch.cat([f.away for f in now])
        cond = chosen(self.cond, torch.zeros(len(now), dtype=torch.long, device=x.device))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x0 = self.denoiser.denoise(x, t, cond, self._call("cond", len(now)))
            return x0 if self.residual == "none" else torch.lerp(away, x0, self.scale)

        x, _ = self.solver.step(denoise, x, t, s, self.solver.init(self.run), SampleRng.joined([f.rng for f in now]))
        for row, frame in enumerate(now):
            frame.x, frame.steps = x[row : row + 1], frame.steps + 1
        steps = self.times.shape[0] - 1
        finished = [f.x for f in now if f.steps == steps]
        self._under_way = [f for f in now if f.steps < steps]
        return finished

    def _call(self, branch: str, frames: int) -> Call:
        """Times of a batch differ, so the call carries the first; evaluations are counted a frame."""
        first, last = float(self.times[0]), float(self.times[1])
        return Call(0, self.times.shape[0] - 1, first, last, 0, branch, self.run.run_id, share=float(frames))


def skip_probability(frame: Tensor, reference: Tensor, threshold: float) -> float:
    """max(0, (S - threshold) / (1 - threshold)), S the cosine of the two frames (section 3.4)."""
    similarity = float(torch.nn.functional.cosine_similarity(frame.flatten().double(), reference.flatten().double(), 0))
    return max(0.0, (similarity - threshold) / (1 - threshold))


@dataclass
class SimilarityFilter:
    """Drops frames that look like the last one that was let through, at random: a still scene costs nearly nothing.

    Attributes:
        threshold: cosine below which every frame is let through.
        longest: most frames in a row that are dropped, so that a stream never stands still for good.
        seed: of the draws.
    """

    threshold: float = 0.98
    longest: int = 10
    seed: int = 0
    _reference: Tensor | None = None
    _dropped: int = 0
    _random: Any = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and -1 <= self.threshold < 1) or self.longest < 0:
            raise ConfigError(
                f"similarity filter: threshold = {self.threshold}, longest = {self.longest}: expected a cosine below 1 "
                "and 0 or more frames"
            )
        self._random = torch.Generator().manual_seed(self.seed)

    def drops(self, frame: Tensor) -> bool:
        """Whether to leave this frame out and show the last result again."""
        number = float(torch.rand((), generator=self._random, dtype=torch.float64))
        if self._reference is not None and self._dropped < self.longest:
            if number < skip_probability(frame, self._reference, self.threshold):
                self._dropped += 1
                return True
        self._reference, self._dropped = frame.clone(), 0
        return False
