"""Solvers of tokens: exact distributions by enumeration, invariants of each rule, and diffusers' own numbers."""

import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from suite.call import Call
from suite.diffusion.denoiser import Counter, NetworkDenoiser
from suite.diffusion.noise import Flow, Masked, Uniform
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Denoise, Solver
from suite.errors import ConfigError
from suite.plugins.solvers._tokens import Draw
from suite.plugins.solvers._unmasking import Unmasking, entropy, rank
from suite.plugins.solvers.block_refinement import BlockRefinement, BlockRefinementSolver
from suite.plugins.solvers.confidence import Confidence
from suite.plugins.solvers.discrete_ddim import (
    DiscreteDDIM,
    MaskedDDIMSolver,
    UniformDDIMSolver,
    given_others,
    routes,
)
from suite.plugins.solvers.entropy_bound import Bounded, EntropyBound
from suite.plugins.solvers.first_hitting import FirstHitting, FirstHittingSolver
from suite.plugins.solvers.mdlm import MDLMSolver
from suite.plugins.solvers.threshold import Above, Threshold
from suite.testing.oracles import Tokens, a_run, drive, law

MASK = 2
JOINT = {(0, 0): 0.4, (0, 1): 0.1, (1, 0): 0.2, (1, 1): 0.3}
"""Two tokens that hang together. Chances of the first are halves, of the second fifths; given the other one they are
twelfths and fifths."""
MARGINALS = {pair: (0.5 * (0.6, 0.4)[pair[1]]) for pair in JOINT}
ALONE, GIVEN = (2, 5), (12, 5)


@cache
def given(*seen: int) -> Tensor:
    fits = {pair: p for pair, p in JOINT.items() if all(s in (MASK, v) for s, v in zip(seen, pair, strict=True))}
    out = torch.zeros(2, 3, dtype=torch.float64)
    for pair, p in fits.items():
        for place, value in enumerate(pair):
            out[place, value] += p / sum(fits.values())
    return out


def correlated(x: Tensor, t: Tensor) -> Tensor:
    """p(x0 given x_t) of the pair, by counting."""
    del t
    return torch.stack([given(*seen) for seen in x.tolist()])


def times(steps: int, first: float = 1.0, last: float = 0.0) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


def pair_law(solver: Solver, steps: int, cells: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """The exact law of a solver on the pair."""

    def sample(rng: SampleRng) -> Tensor:
        return drive(solver, times(steps), correlated, torch.full((len(rng.seeds), 2), MASK), rng=rng)

    return law(sample, cells)


def same(a: dict[tuple[int, ...], float], b: dict[tuple[int, ...], float]) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], abs_tol=1e-12) for k in a)


def counted(denoise: Denoise) -> tuple[Denoise, list[Tensor]]:
    """The denoiser, and the states at which it was asked."""
    states: list[Tensor] = []

    def ask(x: Tensor, t: Tensor) -> Tensor:
        states.append(x.clone())
        return denoise(x, t)

    return ask, states


def uncovered(solver: Solver, target: Tokens, steps: int, batch: int = 1) -> tuple[list[list[int]], Tensor]:
    """How many tokens of each sample an evaluation uncovered, and the result."""
    ask, states = counted(target.denoiser(Masked()))
    assert target.mask_token is not None
    out = drive(solver, times(steps), ask, target.prior(SampleRng(tuple(range(batch)))))
    left = [(x == target.mask_token).sum(-1) for x in (*states, out)]
    return [(a - b).tolist() for a, b in itertools.pairwise(left)], out


# ---- exact laws --------------------------------------------------------------------------------------------------


def test_mdlm_has_its_law_exactly() -> None:
    """Two steps of chance 1/2: with chance 1/2 the tokens come in one step and forget each other."""
    got = pair_law(MDLMSolver(Masked(), Draw()), 2, [(2, 2), ALONE, (1, 1), GIVEN])
    assert same(got, {pair: (p + MARGINALS[pair]) / 2 for pair, p in JOINT.items()})


def test_first_hitting_has_the_law_of_the_model() -> None:
    """An evaluation a token, in a uniform order: the chain rule, whatever the order is."""
    got = pair_law(FirstHittingSolver(Masked(), Draw()), 2, [ALONE, (1, 1, 2, 1), GIVEN, (1, 1, 1, 1)])
    assert same(got, JOINT)


def test_first_hitting_with_one_evaluation_forgets_what_hangs_together() -> None:
    assert same(pair_law(FirstHittingSolver(Masked(), Draw()), 1, [ALONE, (1, 1, 2, 1)]), MARGINALS)


@pytest.mark.parametrize(("steps", "expected"), [(1, MARGINALS), (2, JOINT)])
def test_random_remasking_has_the_law_of_the_model_at_a_token_a_step(
    steps: int, expected: dict[tuple[int, ...], float]
) -> None:
    """One number in halves and one in the middle are in either order as often as two uniform numbers are."""
    cells = [ALONE, (2, 1), GIVEN, (1, 1)][: 2 * steps]
    assert same(pair_law(Unmasking(Masked(), Draw(), "random"), steps, cells), expected)


def test_confidence_prefers_what_is_probable() -> None:
    """Token 1 of the second place is the least certain, so the place is asked first only when it is 0."""
    got = pair_law(Unmasking(Masked(), Draw(), "confidence"), 2, [ALONE, GIVEN])
    # Second place 0 (0.6 > 0.5): kept, then the first given it; else the first is kept, then the second given it.
    expected = {
        (0, 0): 0.6 * 2 / 3 + 0.4 * 0.5 * 0.8,
        (1, 0): 0.6 / 3 + 0.4 * 0.5 * 0.4,
        (0, 1): 0.4 * 0.5 * 0.2,
        (1, 1): 0.4 * 0.5 * 0.6,
    }
    assert same(got, expected)


UNIFORM = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)


@pytest.mark.parametrize(("eta", "cells"), [(0.0, 2), (1.0, 18), (0.5, 36)])
def test_discrete_ddim_takes_one_marginal_to_the_next(eta: float, cells: int) -> None:
    """Uniform noise from alpha = 1/2 to 3/4, where chances are 1/2, or multiples of 1/6 and 1/18."""
    noise, target = Uniform(), Tokens(UNIFORM[None])
    solver = UniformDDIMSolver(noise, Draw(), eta, 0, 1, "random")
    out = torch.zeros(2, dtype=torch.float64)
    for token, weight in enumerate(0.5 * UNIFORM + 0.25):
        got = law(
            lambda rng, token=token: drive(
                solver, times(1, 0.5, 0.25), target.denoiser(noise), torch.full((len(rng.seeds), 1), token), rng=rng
            ),
            [(35,), (cells,), (2,)],
        )
        out += weight * torch.tensor([got.get((k,), 0.0) for k in range(2)], dtype=torch.float64)
    assert torch.allclose(out, 0.75 * UNIFORM + 0.125, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_discrete_ddim_reaches_the_data_from_the_prior(eta: float, steps: int) -> None:
    """The chances themselves, carried through all steps."""
    noise, target = Uniform(), Tokens.random(length=1, vocabulary=5, masked=False)
    data, state = target.probabilities[0], torch.full((5,), 0.2, dtype=torch.float64)
    for t, s in itertools.pairwise(times(steps)):
        p = target.denoiser(noise)(torch.arange(5)[:, None], t)[:, 0]  # [x_t, x0]
        clean, stay = routes(noise.alpha(t), noise.alpha(s), torch.eye(5).bool(), 5, eta)
        to = p * clean
        to = to + torch.diag((p * stay).sum(1)) + ((p * (1 - clean - stay)).sum(1) / 5)[:, None]
        state = state @ to
    assert torch.allclose(state, data, rtol=0, atol=1e-12)


def test_masked_discrete_ddim_without_noise_is_mdlm() -> None:
    target = Tokens.random(length=8)
    runs = (
        drive(s, times(5), target.denoiser(Masked()), target.prior(SampleRng(range(9))))
        for s in (MDLMSolver(Masked(), Draw()), MaskedDDIMSolver(Masked(), Draw(), 0.0))
    )
    assert torch.equal(*runs)


@pytest.mark.parametrize(("first", "share"), [(MASK, 0.25), (0, 0.25), (1, 0.25)])
def test_masks_come_back_as_often_as_the_marginals_allow(first: int, share: float) -> None:
    """From alpha = 1/2 to 3/4 at eta = 1/2: a known token is masked with chance 1/4, a mask is kept with 1/4."""
    noise, p = Masked(), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    solver = MaskedDDIMSolver(noise, Draw(), 0.5)
    # Before: a step without effect from all masks, so that no token counts as given.
    _, state = solver.step(
        Tokens(p, MASK).denoiser(noise), torch.tensor([[MASK]]), *times(1, 1, 0.9), None, SampleRng((0,))
    )

    def sample(rng: SampleRng) -> Tensor:
        x = torch.full((len(rng.seeds), 1), first)
        kept = type(state)(state.given.expand(x.shape), state.mask)
        return solver.step(Tokens(p, MASK).denoiser(noise), x, *times(1, 0.5, 0.25), kept, rng)[0]

    got = law(sample, [(4,), (2,)])
    assert got[MASK,] == share
    # P(mask at s) = 1/2 1/4 + 1/2 1/4 = sigma_s.
    assert noise.sigma(0.25) == share


def test_given_tokens_are_never_masked_again() -> None:
    target, solver = Tokens.random(length=6), MaskedDDIMSolver(Masked(), Draw(), 1.0)
    ask, states = counted(target.denoiser(Masked()))
    drive(solver, times(6), ask, torch.tensor([[0, 4, 4, 3, 4, 1]] * 20))
    assert all((x[:, [0, 3, 5]] == torch.tensor([0, 3, 1])).all() for x in states)
    seen = torch.stack(states)
    assert ((seen[:-1] != 4) & (seen[1:] == 4)).any(), "nothing was masked again, so nothing is shown"


# ---- correctors --------------------------------------------------------------------------------------------------

PAIR = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.02], [0.02, 0.06, 0.20]], dtype=torch.float64)


def noised(alpha: float) -> tuple[Tensor, Tensor]:
    """p_t of two tokens under uniform noise, [3, 3], and p(x0 given x_t) of each, [9, 2, 3]."""
    kernel = alpha * torch.eye(3, dtype=torch.float64) + (1 - alpha) / 3
    marginal = kernel.T @ PAIR @ kernel
    answers = []
    for a, b in itertools.product(range(3), repeat=2):
        joint = PAIR * kernel[:, a][:, None] * kernel[:, b][None]
        joint /= joint.sum()
        answers.append(torch.stack([joint.sum(1), joint.sum(0)]))
    return marginal, torch.stack(answers)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_what_the_others_say_is_the_true_conditional(alpha: float) -> None:
    marginal, answers = noised(alpha)
    states = torch.tensor(list(itertools.product(range(3), repeat=2)))
    got = given_others(answers, states, torch.tensor([[alpha]], dtype=torch.float64))
    first = marginal / marginal.sum(0)  # p(a | b), and below p(b | a)
    second = marginal / marginal.sum(1, keepdim=True)
    expected = torch.stack([torch.stack([first[:, b], second[a]]) for a, b in states.tolist()])
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_a_corrector_leaves_the_distribution_as_it_is() -> None:
    """One sweep from the exact p_s, by its own chances over all nine states."""
    alpha = 0.6
    marginal, answers = noised(alpha)
    states = list(itertools.product(range(3), repeat=2))
    others = given_others(answers, torch.tensor(states), torch.tensor([[alpha]], dtype=torch.float64))
    kernel = torch.zeros(9, 9, dtype=torch.float64)
    for row, (a, b) in enumerate(states):
        for value in range(3):
            kernel[row, states.index((value, b))] += 0.5 * others[row, 0, value]
            kernel[row, states.index((a, value))] += 0.5 * others[row, 1, value]
    assert torch.allclose(marginal.flatten() @ kernel, marginal.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("select", ["random", "margin"])
def test_a_sweep_draws_as_many_places_as_it_says(select: str) -> None:
    noise, target = Uniform(), Tokens.random(length=12, vocabulary=40, masked=False)
    solver = DiscreteDDIM(corrector=3, places=2, select=select).solver(noise, a_run())
    ask, states = counted(target.denoiser(noise))
    drive(solver, times(4), ask, target.prior(SampleRng((0, 1))))
    assert len(states) == solver.evaluations(4) == 4 + 3 * 3
    changed = [int((a != b).sum(-1).max()) for a, b in itertools.pairwise(states)]
    sweeps = [c for k, c in enumerate(changed) if k % 4]
    assert max(sweeps) == 2


# ---- data decide how many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plugin",
    [EntropyBound(bound=0), Threshold(threshold=1), EntropyBound(bound=0, block=3), Threshold(factor=1e-9)],
    ids=str,
)
def test_the_strictest_rule_is_a_token_an_evaluation(plugin: EntropyBound | Threshold) -> None:
    counts, _ = uncovered(plugin.solver(Masked(), a_run()), Tokens.random(length=9), 20)
    assert counts == [[1]] * 9


@pytest.mark.parametrize("plugin", [EntropyBound(bound=1e3), Threshold(threshold=0)], ids=str)
def test_the_loosest_rule_is_one_evaluation(plugin: EntropyBound | Threshold) -> None:
    counts, _ = uncovered(plugin.solver(Masked(), a_run()), Tokens.random(length=9), 20)
    assert counts == [[9]]


@pytest.mark.parametrize("by", ["entropy", "confidence", "margin", "random"])
@pytest.mark.parametrize("bound", [0.0, 0.5, 1.5, 4.0])
def test_entropies_stay_within_the_bound_and_use_it(bound: float, by: str) -> None:
    """sum - max <= bound for what is uncovered, and > bound with the next one."""
    target = Tokens.random(length=12, vocabulary=7, seed=3)
    h = entropy(target.probabilities)
    solver = EntropyBound(bound, by=by).solver(Masked(), a_run())
    ask, states = counted(target.denoiser(Masked()))
    out = drive(solver, times(12), ask, target.prior(SampleRng((0,))))
    for before, after in itertools.pairwise([*states, out]):
        new = h[(before != after)[0]]
        assert new.sum() - new.max() <= bound + 1e-12
        rest = h[(after == target.mask_token)[0]].sort().values
        if by == "entropy" and len(rest):
            assert new.sum() + rest[0] - torch.cat([new, rest[:1]]).max() > bound


@pytest.mark.parametrize("level", [0.3, 0.35, 0.5])
def test_all_that_is_above_the_threshold_is_uncovered(level: float) -> None:
    """At temperature 0 certainties are the largest chances, and independent tokens do not change them."""
    target = Tokens.random(length=24, vocabulary=6)
    best = target.probabilities.amax(-1)
    counts, out = uncovered(Threshold(level, temperature=0).solver(Masked(), a_run()), target, 24)
    above = int((best > level).sum())
    assert counts == ([[above]] if above else []) + [[1]] * (24 - above)
    assert out[0].tolist() == target.probabilities.argmax(-1).tolist()


def test_the_factor_falls_with_the_number_of_tokens() -> None:
    """Chances 0.9, 0.8, 0.7: (n + 1)(1 - c) is 0.2, 0.6, 1.2, so a factor of 1 takes two and then the third."""
    p = torch.tensor([[0.7, 0.3, 0], [0.1, 0.9, 0], [0.8, 0.2, 0]], dtype=torch.float64)
    counts, _ = uncovered(Threshold(factor=1.0, temperature=0).solver(Masked(), a_run()), Tokens(p, 2), 3)
    assert counts == [[2], [1]]


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("plugin", [EntropyBound(bound=0), Threshold(threshold=1)], ids=str)
def test_steps_are_the_most_that_is_spent(plugin: EntropyBound | Threshold, steps: int) -> None:
    """With fewer steps than tokens the schedule's number goes, and nothing is masked at the end."""
    counts, out = uncovered(plugin.solver(Masked(), a_run()), Tokens.random(length=12), steps)
    left = [math.floor(12 * k / steps + 1e-9) for k in range(steps, -1, -1)]
    assert [c[0] for c in counts] == [a - b for a, b in itertools.pairwise(left)]
    assert (out != 4).all()


def test_a_finished_sample_waits_for_the_others() -> None:
    """Evaluations of a batch are those of its slowest sample, and each sample is what it is alone."""
    sharp = torch.zeros(6, 5, dtype=torch.float64)
    sharp[:, 0] = 1
    sharp[3:] = torch.tensor([0.3, 0.3, 0.2, 0.2, 0])
    target, solver = Tokens(sharp, 4), Threshold(0.9).solver(Masked(), a_run())
    x = torch.tensor([[4, 4, 4, 0, 0, 0], [4, 4, 4, 4, 4, 0]])
    ask, states = counted(target.denoiser(Masked()))
    both = drive(solver, times(6), ask, x)
    assert len(states) == 3  # the first sample needs one
    for row in range(2):
        ask, alone = counted(target.denoiser(Masked()))
        assert torch.equal(drive(solver, times(6), ask, x[[row]], seeds=(row,)), both[[row]])
        assert len(alone) == (1, 3)[row]


@pytest.mark.parametrize("steps", [3, 6, 40])
def test_first_hitting_spends_an_evaluation_a_token_if_it_may(steps: int) -> None:
    counts, out = uncovered(FirstHittingSolver(Masked(), Draw()), Tokens.random(length=6), steps, batch=3)
    assert counts == [[6 // min(steps, 6)] * 3] * min(steps, 6)
    assert (out != 4).all()


@pytest.mark.parametrize("noise", [Masked(), Masked("cosine")], ids=lambda n: n.shape)
def test_first_hitting_stops_where_it_is_told(noise: Masked) -> None:
    """At time s every place is masked with chance sigma_s, independently: mean and variance of the number."""
    target, last = Tokens.random(length=6), torch.tensor(0.4, dtype=torch.float64)
    seeds = tuple(range(4000))
    solver = FirstHittingSolver(noise, Draw())
    x = solver.solve(
        target.denoiser(noise), target.prior(SampleRng(seeds)), last.new_ones(()), last, 6, SampleRng(seeds)
    )
    left, chance = (x == 4).sum(-1).double(), float(noise.sigma(last))
    mean, variance = 6 * chance, 6 * chance * (1 - chance)
    assert abs(float(left.mean()) - mean) < 4 * math.sqrt(variance / len(seeds))
    fourth = variance * (1 + 3 * (6 - 2) * chance * (1 - chance))
    assert abs(float(left.var()) - variance) < 4 * math.sqrt((fourth - variance**2) / len(seeds))


# ---- order and blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "order"), [("confidence", [2, 1, 0]), ("margin", [1, 2, 0]), ("entropy", [1, 2, 0])])
def test_places_come_in_the_order_asked_for(by: str, order: list[int]) -> None:
    """The third place has the most probable token, but a rival nearly as probable."""
    p = torch.tensor([[0.34, 0.33, 0.33, 0], [0.44, 0.19, 0.37, 0], [0.52, 0.48, 0.0, 0]], dtype=torch.float64)
    if by != "confidence":
        p[1] = torch.tensor([0.44, 0.01, 0.0, 0.0]) / 0.45
        p[2] = torch.tensor([0.99, 0.2, 0.0, 0.0]) / 1.19
    solver = Unmasking(Masked(), Draw(0.0), by)
    ask, states = counted(Tokens(p, 3).denoiser(Masked()))
    out = drive(solver, times(3), ask, torch.full((1, 3), 3))
    found = [int((a != b)[0].nonzero()) for a, b in itertools.pairwise([*states, out])]
    assert found == order


@pytest.mark.parametrize("block", [1, 3, 4, 12])
@pytest.mark.parametrize("steps", [4, 5, 12])
@pytest.mark.parametrize("plugin", [Confidence, Threshold, EntropyBound], ids=lambda c: c.__name__)
def test_blocks_are_filled_from_left_to_right(plugin: type, steps: int, block: int) -> None:
    solver = plugin(block=block).solver(Masked(), a_run())
    target = Tokens.random(length=12)
    ask, states = counted(target.denoiser(Masked()))
    out = drive(solver, times(steps), ask, target.prior(SampleRng((0, 1, 2))))
    for x in [*states, out]:
        for row in (x == 4).reshape(3, -1, block).any(-1).tolist():
            assert row == sorted(row), "a block was begun while one to its left has masks, or was left behind"
        assert (
            (x != 4).reshape(3, -1, block).any(-1).long().sum(-1)
            - (x != 4).reshape(3, -1, block).all(-1).long().sum(-1)
            <= 1
        ).all()


def test_rank_keeps_blocks_apart() -> None:
    score = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    masked = torch.tensor([[False, True, True, True, False, True]])
    p = torch.zeros(1, 6, 2)
    for least, eligible, first in ((1, 1, [1]), (2, 3, [1, 3, 2]), (4, 4, [1, 3, 2, 5])):
        got = rank(p, score, score, masked, torch.tensor([least]), 2)
        assert int(got.eligible.sum()) == eligible and got.order[0, :eligible].tolist() == first


@pytest.mark.parametrize("block", [0, 3])
def test_an_edit_asks_again_for_the_least_certain_token(block: int) -> None:
    """Two evaluations a block more; a token that the others contradict is replaced, a given one never."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        """Place 0 is 1 at first and 0 once the others are known; all others are 0."""
        p = torch.zeros(*x.shape, 3, dtype=torch.float64)
        known = (x[:, 1:] != MASK).all(-1)
        p[..., 0] = 0.95
        p[..., 1] = 0.05
        p[:, 0] = torch.where(known[:, None], torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.0, 0.94, 0.06])).double()
        return torch.where((x == MASK)[..., None], p, torch.nn.functional.one_hot(x, 3).double())

    def run(edits: int, *tokens: int) -> list[int]:
        solver = BlockRefinement(block, 0.5, edits=edits, temperature=0).solver(Masked(), a_run())
        return drive(solver, times(6), denoise, torch.tensor([tokens]))[0].tolist()

    assert run(0, MASK, MASK, MASK) == [1, 0, 0]
    assert run(1, MASK, MASK, MASK) == [0, 0, 0]
    assert run(2, 1, MASK, MASK) == [1, 0, 0]


def test_edits_are_counted_and_bounded() -> None:
    solver = BlockRefinement(4, 1.0, edits=2).solver(Masked(), a_run())
    assert isinstance(solver, BlockRefinementSolver)
    target = Tokens.random(length=12)
    ask, states = counted(target.denoiser(Masked()))
    drive(solver, times(12), ask, target.prior(SampleRng((0,))))
    assert len(states) == 12 + 3 * 2 <= solver.evaluations(12)


# ---- diffusers ---------------------------------------------------------------------------------------------------


def logits_of(x: Tensor, vocabulary: int = 9) -> Tensor:
    """Some answer that depends on all tokens, with the mask (the last one) impossible."""
    generator = torch.Generator().manual_seed(int((x * torch.arange(1, x.shape[1] + 1)).sum()))
    out = 2 * torch.randn(x.shape[1], vocabulary, generator=generator, dtype=torch.float64)
    out[:, -1] = -torch.inf
    return out


def network(x: Tensor, t: Tensor) -> Tensor:
    del t
    p = torch.stack([logits_of(row[None]).softmax(-1) for row in x])
    known = torch.nn.functional.one_hot(x, 9).double()
    return torch.where((x == 8)[..., None], p, known)


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 5.0])
def test_entropy_bound_accepts_what_diffusers_accepts(bound: float) -> None:
    schedulers = pytest.importorskip("diffusers").schedulers
    theirs = schedulers.scheduling_entropy_bound.EntropyBoundScheduler(bound, t_max=1.0, t_min=1.0)
    logits = 3 * torch.randn(5, 16, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    accepted = theirs.step(logits, 0, torch.zeros(5, 16, dtype=torch.long)).accepted_index
    p, masked = logits.softmax(-1), torch.ones(5, 16, dtype=torch.bool)
    ranking = rank(p, p.amax(-1), -entropy(p), masked, torch.ones(5, dtype=torch.long), 0)
    ours = torch.arange(16) < Bounded(bound)(ranking)[:, None]
    assert torch.equal(torch.zeros_like(masked).scatter(-1, ranking.order, ours), accepted)


@pytest.mark.parametrize(("length", "steps"), [(8, 4), (8, 3), (7, 4), (6, 6)])
def test_block_refinement_follows_diffusers_without_a_threshold(length: int, steps: int) -> None:
    """The same tokens after every step."""
    module = pytest.importorskip("diffusers").schedulers.scheduling_block_refinement
    theirs = module.BlockRefinementScheduler(length, steps, threshold=1.0)
    theirs.set_timesteps(steps)
    solver, state = Unmasking(Masked(), Draw(0.0)), None
    x = y = torch.full((1, length), 8)
    for k, (t, s) in enumerate(itertools.pairwise(times(steps))):
        x, state = solver.step(network, x, t, s, state, SampleRng((0,)))
        y = theirs.step(logits_of(y)[None], k, y, mask_token_id=8, temperature=0.0).prev_sample
        assert torch.equal(x, y), k
    assert (x != 8).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_a_step_of_block_refinement_is_that_of_diffusers(threshold: float) -> None:
    """From all masks. Later steps differ by design: theirs take L / n tokens even when ahead, ours what is owed."""
    module = pytest.importorskip("diffusers").schedulers.scheduling_block_refinement
    theirs = module.BlockRefinementScheduler(12, 4, threshold=threshold)
    theirs.set_timesteps(4)
    x = torch.full((1, 12), 8)
    y = theirs.step(logits_of(x)[None], 0, x, mask_token_id=8, temperature=0.0).prev_sample
    solver = BlockRefinement(12, threshold, temperature=0).solver(Masked(), a_run())
    ours, _ = solver.step(network, x, *times(4)[:2], solver.init(a_run()), SampleRng((0,)))
    assert torch.equal(ours, y)


def test_confidence_is_amused_at_temperature_0() -> None:
    """Answers so sharp that its multinomial draw has no choice, and certainties that still differ."""
    module = pytest.importorskip("diffusers").schedulers.scheduling_amused
    theirs = module.AmusedScheduler(mask_token_id=8, masking_schedule="cosine")
    theirs.set_timesteps(4, temperature=(0, 0))
    sharp = torch.full((8, 9), -torch.inf, dtype=torch.float64)
    for place, token in enumerate((3, 1, 4, 1, 5, 2, 6, 5)):
        sharp[place, token], sharp[place, 7] = 0.0, -9.0 - 0.1 * ((place * 3) % 8)
    solver, state = Unmasking(Masked("cosine"), Draw(0.0)), None
    x = y = torch.full((1, 8), 8)
    for k, (t, s) in enumerate(itertools.pairwise(times(4))):
        denoise = Tokens(sharp.softmax(-1), 8).denoiser(Masked())
        x, state = solver.step(denoise, x, t, s, state, SampleRng((0,)))
        y = theirs.step(sharp[None].clone(), theirs.timesteps[k], y, generator=torch.Generator().manual_seed(0))[0]
        assert torch.equal(x, y), k


@pytest.mark.parametrize("step", [0, 1, 5, 9])
def test_the_posterior_is_that_of_diffusers(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chances that its DiscreteDDIM hands to the multinomial draw."""
    module = pytest.importorskip("diffusers").schedulers.scheduling_discrete_ddim
    theirs = module.DiscreteDDIMScheduler(10)
    given: list[Tensor] = []

    def multinomial(p: Tensor, num_samples: int, generator: None) -> Tensor:
        given.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    x = torch.tensor([[0, 1, 2, 3]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 2, 1]]), 6).double()
    theirs.step(logits, step, x)
    noise = Uniform()
    alphas = (noise.alpha(1 - step / 10), noise.alpha(1 - (step + 1) / 10))
    clean, stay = routes(*alphas, x == logits.argmax(-1), 6, 1.0)
    ours = torch.stack([clean, stay, 1 - clean - stay], -1)
    assert torch.allclose(ours[0], given[0].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [0, 4, 8])
def test_correctors_draw_with_the_chances_of_diffusers(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("diffusers").schedulers.scheduling_discrete_ddim
    theirs = module.DiscreteDDIMScheduler(10, corrector_k=4, corrector_selection="random")
    given: list[Tensor] = []

    def multinomial(p: Tensor, num_samples: int, generator: None) -> Tensor:
        given.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: -torch.arange(4.0)[None])  # places in order
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.tensor([[0, 1, 2, 3]])
    theirs.step_correct(logits, step, x)
    alpha = torch.tensor([[(step + 1) / 10]], dtype=torch.float64)
    assert torch.allclose(given_others(logits.softmax(-1), x, alpha)[0], given[0], rtol=0, atol=1e-12)


# ---- the engine's side -------------------------------------------------------------------------------------------


def test_logits_over_uniform_noise_are_probabilities_as_they_are() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(4.0).expand(*x.shape, 4)

    counter = Counter()
    denoiser = NetworkDenoiser(
        Table(), lambda m, x, t, c: m(x), Uniform(), Prediction.LOGITS, torch.float32, counter
    )  # fmt: skip
    out = denoiser.denoise(torch.tensor([[0, 3]]), torch.tensor(0.5).double(), {}, Call(0, 1, 0.5, 0.0))
    assert torch.allclose(out, torch.arange(4.0).softmax(-1).expand(1, 2, 4)) and counter.depth == 1


PLUGINS = [Confidence, EntropyBound, Threshold, FirstHitting, BlockRefinement, DiscreteDDIM]


@pytest.mark.parametrize("cls", PLUGINS, ids=lambda c: c.__name__)
def test_real_vectors_are_refused(cls: type) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        cls().solver(Flow(), a_run())


@pytest.mark.parametrize("cls", [c for c in PLUGINS if c is not DiscreteDDIM], ids=lambda c: c.__name__)
def test_uniform_noise_is_refused(cls: type) -> None:
    with pytest.raises(ConfigError, match="noise is uniform"):
        cls().solver(Uniform(), a_run())


def test_correctors_are_for_uniform_noise() -> None:
    with pytest.raises(ConfigError, match="block-refinement"):
        DiscreteDDIM(corrector=1).solver(Masked(), a_run())


@pytest.mark.parametrize(("cls", "options"), [
    (Confidence, {"block": -1}), (EntropyBound, {"bound": -0.1}), (EntropyBound, {"block": -1}),
    (Threshold, {"threshold": 1.5}), (Threshold, {"factor": -1}), (Threshold, {"temperature": -1}),
    (FirstHitting, {"top_p": 0}), (BlockRefinement, {"edit": 2}), (BlockRefinement, {"edits": -1}),
    (BlockRefinement, {"places": 0}), (DiscreteDDIM, {"eta": 1.1}), (DiscreteDDIM, {"corrector": -1}),
])  # fmt: skip
def test_options_out_of_range(cls: type, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        cls(**options)


def test_above_needs_more_than_the_threshold() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]] * 2, dtype=torch.float64)
    masked = torch.ones(1, 2, dtype=torch.bool)
    ranking = rank(p[None], p.amax(-1)[None], p.amax(-1)[None], masked, torch.ones(1, dtype=torch.long), 0)
    assert Above(0.5)(ranking).tolist() == [0] and Above(0.49)(ranking).tolist() == [2]
