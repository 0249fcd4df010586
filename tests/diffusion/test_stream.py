"""A stream of frames: as each alone, at one call a frame."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Counter
from suite.diffusion.rng import SampleRng
from suite.diffusion.start import diffuse
from suite.diffusion.stream import FrameStream, SimilarityFilter, skip_probability
from suite.errors import ConfigError
from suite.plugins.solvers.ancestral import Ancestral
from suite.plugins.solvers.ddim import DDIM
from suite.plugins.solvers.dpmpp_2m import DPMpp2M
from suite.plugins.solvers.heun import Heun
from suite.testing.tiny import Tiny

TINY = Tiny.build()
TIMES = torch.tensor([0.8, 0.5, 0.2, 0.0], dtype=torch.float64)


def movie(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    start, way = torch.randn(2, 1, 4, 8, 8, generator=generator)
    return [0.5 * (start + 0.2 * k * way) for k in range(count)]


def stream(solver: Any, counter: Counter, **options: Any) -> FrameStream:
    cond, run = TINY.cond((0,)), TINY.run((0,))
    made = solver.solver(TINY.noise, run)
    options.setdefault("times", TIMES)
    return FrameStream(TINY.denoiser(None, counter), TINY.noise, made, cond=cond["cond"], run=run, **options)


def alone(frame: Tensor, solver: Any, seed: int, residual: str = "none", scale: float = 1.0) -> Tensor:
    """The frame by itself, step after step, written anew."""
    cond, run, rng = TINY.cond((0,)), TINY.run((0,)), SampleRng([seed])
    made, denoiser = solver.solver(TINY.noise, run), TINY.denoiser()
    x = diffuse(TINY.noise, frame, TIMES[0], rng)
    call, reference = Call(0, 3, 0.8, 0.5), frame
    if residual == "once":
        reference = denoiser.denoise(x, TIMES[0], cond["uncond"], call)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoiser.denoise(x, t, cond["cond"], call)
        return x0 if residual == "none" else reference + scale * (x0 - reference)

    for t, s in itertools.pairwise(TIMES):
        x, _ = made.step(denoise, x, t, s, None, rng)
    return x


@pytest.mark.parametrize("solver", [DDIM(), Ancestral()], ids=["ddim", "ancestral"])
@pytest.mark.parametrize("seed", [0, None])
@torch.inference_mode()
def test_frames_come_out_as_each_alone(solver: Any, seed: int | None) -> None:
    counter, frames = Counter(), movie()
    got = list(stream(solver, counter, seed=seed).frames(frames))
    assert len(got) == len(frames)
    for k, (frame, out) in enumerate(zip(frames, got, strict=True)):
        assert float((out - alone(frame, solver, k if seed is None else seed)).abs().max()) < 1e-5
    # n evaluations a frame, but as many calls as frames, and n - 1 more to drain.
    assert (counter.nfe, counter.depth) == (3 * len(frames), len(frames) + 2)


@pytest.mark.parametrize(("residual", "evaluations"), [("self", 3), ("once", 4)])
@torch.inference_mode()
def test_residual_guidance(residual: Any, evaluations: int) -> None:
    counter, frames, cond = Counter(), movie(), TINY.cond((0,))
    options = {"residual": residual, "scale": 1.7, "uncond": cond["uncond"]}
    got = list(stream(DDIM(), counter, **options).frames(frames))
    for frame, out in zip(frames, got, strict=True):
        assert float((out - alone(frame, DDIM(), 0, residual, 1.7)).abs().max()) < 1e-5
    assert counter.nfe == evaluations * len(frames)
    plain = list(stream(DDIM(), Counter()).frames(frames))
    unit = list(stream(DDIM(), Counter(), **{**options, "scale": 1.0}).frames(frames))
    assert all(float((a - b).abs().max()) < 1e-5 for a, b in zip(plain, unit, strict=True))
    assert float((plain[0] - got[0]).abs().max()) > 1e-2


@torch.inference_mode()
def test_a_frame_is_ready_after_as_many_as_there_are_steps() -> None:
    it = stream(DDIM(), Counter())
    assert [len(it.push(frame)) for frame in movie()] == [0, 0, 1, 1, 1, 1]


def test_probability_of_leaving_a_frame_out() -> None:
    a = torch.tensor([1.0, 0.0])
    for angle, expected in [(0.0, 1.0), (0.2, (0.9800665778412416 - 0.9) / 0.1), (0.5, 0.0), (3.0, 0.0)]:
        b = torch.tensor([torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))])
        assert skip_probability(a, b, 0.9) == pytest.approx(expected, abs=1e-5)


def test_filter_drops_as_often_as_it_says() -> None:
    still, moved = torch.ones(4), torch.tensor([1.0, 1, 1, 0.5])
    p = skip_probability(moved, still, 0.9)
    assert 0.5 < p < 0.95
    count = 0
    for seed in range(2000):
        it = SimilarityFilter(0.9, seed=seed)
        assert not it.drops(still)
        count += it.drops(moved)
    assert abs(count / 2000 - p) < 4 * (p * (1 - p) / 2000) ** 0.5
    it = SimilarityFilter(0.9, longest=3)
    assert [it.drops(still) for _ in range(9)] == [False, True, True, True, False, True, True, True, False]
    assert not it.drops(-still)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (DPMpp2M(), {}, "must be a one-step solver .* got one with multistep"),
        (Heun(), {}, "got one with repeated-evaluations"),
        (DDIM(), {"times": torch.tensor([0.8, 0.1])}, "that end at 0"),
        (DDIM(), {"residual": "once"}, "give `uncond`"),
    ],
)
def test_refusals(solver: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(solver, Counter(), **options)
    with pytest.raises(ConfigError, match=r"threshold = 1.0"):
        SimilarityFilter(1.0)
