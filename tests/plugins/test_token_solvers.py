"""Solvers of masked tokens against distributions that are known exactly."""

import itertools
import math
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import Flow, Masked, Uniform
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Denoise, Solver
from suite.errors import ConfigError
from suite.plugins.solvers._tokens import Draw
from suite.plugins.solvers._unmasking import Unmasking
from suite.plugins.solvers.confidence import Confidence
from suite.plugins.solvers.mdlm import MDLM, MDLMSolver
from suite.testing.oracles import Tokens, a_run, drive

SEEDS = tuple(range(4000))
NOISES = [Masked(), Masked("cosine")]
MASK = 2
JOINT = {(0, 0): 0.4, (1, 1): 0.4, (0, 1): 0.15, (1, 0): 0.05}
"""Two tokens that hang together: drawing both in one step would get the product of their marginals."""


def correlated(x: Tensor, t: Tensor) -> Tensor:
    """p(x0 given x_t) of the pair, by counting."""
    del t
    return torch.stack([given(*seen) for seen in x.tolist()])


@cache
def given(*seen: int) -> Tensor:
    fits = {pair: p for pair, p in JOINT.items() if all(s in (MASK, v) for s, v in zip(seen, pair, strict=True))}
    out = torch.zeros(2, 3, dtype=torch.float64)
    for pair, p in fits.items():
        for place, value in enumerate(pair):
            out[place, value] += p / sum(fits.values())
    return out


def times(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def masks(length: int, mask: int, batch: int) -> Tensor:
    return torch.full((batch, length), mask)


def mdlm(noise: Masked | None = None) -> MDLMSolver:
    return MDLMSolver(noise or Masked(), Draw())


def confident(temperature: float = 1.0, noise: Masked | None = None) -> Unmasking:
    return Unmasking(noise or Masked(), Draw(temperature))


def within(found: int, trials: int, chance: float) -> bool:
    return abs(found / trials - chance) <= 4 * math.sqrt(max(chance * (1 - chance), 1e-12) / trials)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.shape)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_mdlm_reaches_the_distribution_of_the_data(noise: Masked, steps: int) -> None:
    """Independent tokens leave no error at any number of steps."""
    target = Tokens.random(length=4)
    rng = SampleRng(SEEDS)
    out = drive(mdlm(noise), times(steps), target.denoiser(noise), target.prior(rng), rng=rng)
    for place, chances in enumerate(target.probabilities.tolist()):
        for token, chance in enumerate(chances):
            assert within(int((out[:, place] == token).sum()), len(SEEDS), chance)


@pytest.mark.parametrize("draw", [Draw(), Draw(0.7, 0.8), Draw(0)], ids=str)
def test_mdlm_draws_only_what_it_uncovers(draw: Draw) -> None:
    """The same bits as drawing for every place and keeping what is uncovered, from the same stream."""

    def step(denoise, x, t, s, state, rng):
        probabilities = denoise(x, t)
        uncover = rng.uniform(x.shape[1:]) < 1 - float(s / t)
        drawn = draw(probabilities, lambda: rng.uniform(x.shape[1:]))
        return torch.where(uncover, drawn, x), state

    target, rows = Tokens.random(length=6), []
    ours = MDLMSolver(Masked(), draw)
    for take in (ours.step, step):
        rng = SampleRng(SEEDS[:64])
        x, state, denoise = target.prior(rng), None, target.denoiser(Masked())
        for t, s in itertools.pairwise(times(5)):
            x, state = take(denoise, x, t, s, state, rng)
        rows.append(x)
    assert torch.equal(*rows)
    sizes = []

    def counting(x, t):
        out = target.denoiser(Masked())(x, t)
        sizes.append(int((x == target.mask_token).sum()))
        return out

    seen = []
    watched = MDLMSolver(Masked(), Draw())
    object.__setattr__(watched, "draw", lambda p, uniform: (seen.append(len(p)), Draw()(p, uniform))[1])
    rng = SampleRng(SEEDS[:64])
    drive(watched, times(5), counting, target.prior(rng), rng=rng)
    assert sum(seen) == sizes[0], "every place is drawn once, when it is uncovered"


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.shape)
def test_mdlm_leaves_as_many_masks_as_the_schedule_says(noise: Masked) -> None:
    target = Tokens.random(length=6)
    rng = SampleRng(SEEDS[:2000])
    grid = torch.tensor([1.0, 0.7, 0.35], dtype=torch.float64)
    x = drive(mdlm(noise), grid, target.denoiser(noise), target.prior(rng), rng=rng)
    assert within(int((x == target.mask_token).sum()), x.numel(), float(noise.sigma(grid[-1])))


def chances(steps: int) -> dict[tuple[int, ...], float]:
    """What MDLM gives for the pair, exactly: both uncovered in one step with chance sum of r^2 over the steps."""
    together, grid = 0.0, times(steps).tolist()
    for t, s in itertools.pairwise(grid):
        together += (t - s) ** 2  # linear alpha: each of the two is uncovered in this step with chance t - s
    first = {v: sum(p for pair, p in JOINT.items() if pair[0] == v) for v in (0, 1)}
    second = {v: sum(p for pair, p in JOINT.items() if pair[1] == v) for v in (0, 1)}
    return {(a, b): together * first[a] * second[b] + (1 - together) * p for (a, b), p in JOINT.items()}


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_mdlm_is_wrong_only_by_tokens_drawn_together(steps: int) -> None:
    rng = SampleRng(SEEDS)
    out = drive(mdlm(), times(steps), correlated, masks(2, MASK, len(SEEDS)), rng=rng)
    found = Counter(map(tuple, out.tolist()))
    assert all(within(found[pair], len(SEEDS), p) for pair, p in chances(steps).items())


def test_the_error_of_few_steps_would_be_seen() -> None:
    assert abs(chances(1)[0, 1] - JOINT[0, 1]) > 4 * math.sqrt(0.25 / len(SEEDS))


@pytest.mark.parametrize("solver", [mdlm(), confident()], ids=["mdlm", "confidence"])
def test_known_tokens_stay(solver: Solver) -> None:
    target = Tokens.random(length=6)
    x = torch.tensor([[0, 4, 4, 3, 4, 1]])
    out = drive(solver, times(4), target.denoiser(Masked()), x)
    assert out[0, [0, 3, 5]].tolist() == [0, 3, 1]
    assert (out != target.mask_token).all()


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.shape)
@pytest.mark.parametrize("steps", [1, 4, 6, 24, 30])
def test_confidence_uncovers_the_schedules_number(noise: Masked, steps: int) -> None:
    target, solver = Tokens.random(length=24), confident(noise=noise)
    x, state, grid = target.prior(SampleRng((0, 1))), solver.init(a_run()), times(steps)
    for t, s in itertools.pairwise(grid):
        x, state = solver.step(target.denoiser(noise), x, t, s, state, SampleRng((5, 6)))
        left = (x == target.mask_token).sum(-1).tolist()
        assert left == [math.floor(24 * float(noise.sigma(s)) + 1e-9)] * 2


def test_confidence_takes_the_most_certain_first() -> None:
    sure = torch.tensor([0.6, 0.9, 0.7, 0.8])
    p = torch.stack([sure, 1 - sure, torch.zeros(4)], dim=-1).double()
    x, _ = confident(0).step(Tokens(p, 2).denoiser(Masked()), masks(4, 2, 1), *times(2)[:2], None, SampleRng((0,)))
    assert x.tolist() == [[2, 0, 2, 0]]


def test_confidence_without_temperature_is_the_same_for_every_seed() -> None:
    target = Tokens.random(length=8)
    x = masks(8, 4, 3)
    out = drive(confident(0), times(3), target.denoiser(Masked()), x, rng=SampleRng((0, 1, 2)))
    assert out.tolist() == [target.probabilities.argmax(-1).tolist()] * 3


@pytest.mark.parametrize(("draw", "expected"), [
    (Draw(0.5), [1 / 14, 4 / 14, 9 / 14]),
    (Draw(1, 0.6), [0, 2 / 5, 3 / 5]),
    (Draw(1, 0.4), [0, 0, 1]),
])  # fmt: skip
def test_draw_sharpens_and_cuts(draw: Draw, expected: list[float]) -> None:
    p = (torch.tensor([1.0, 2.0, 3.0]) / 6).expand(1, 9000, 3)
    even = (torch.arange(9000, dtype=torch.float64) / 9000)[None]
    found = torch.bincount(draw(p, lambda: even)[0], minlength=3) / 9000
    assert torch.allclose(found, torch.tensor([float(e) for e in expected]), atol=2e-4)


def test_a_token_without_a_chance_is_never_drawn() -> None:
    p = torch.tensor([[[0.0, 0.5, 0.0, 0.5, 0.0]]])
    for u in (0.0, 0.4999, 0.5, 1 - 2**-24):
        assert Draw()(p, lambda u=u: torch.tensor([[u]])).item() in (1, 3)


@pytest.mark.parametrize("plugin", [MDLM(), Confidence()])
@pytest.mark.parametrize("noise", [Flow(), Uniform()], ids=lambda n: n.family)
def test_other_noise_is_refused(plugin: MDLM | Confidence, noise: Flow | Uniform) -> None:
    with pytest.raises(ConfigError, match="masked tokens"):
        plugin.solver(noise, a_run())


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": 11}, {"top_p": 0}, {"top_p": 1.1}])
@pytest.mark.parametrize("cls", [MDLM, Confidence])
def test_options_out_of_range(cls: type, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        cls(**options)


def test_a_denoiser_counts_once_a_step() -> None:
    target, calls = Tokens.random(), []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return target.denoiser(Masked())(x, t)

    denoise: Denoise = counted
    drive(confident(), times(5), denoise, target.prior(SampleRng((0,))))
    assert calls == times(5)[:-1].tolist()
