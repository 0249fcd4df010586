"""PriorGrad, AdaDiff's policy, soft-masked words and adaptive positions: what each promises, exactly."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import Flow, Sqrt, VPLinear
from suite.diffusion.schedule import check_timesteps
from suite.errors import ConfigError
from suite.modalities.shared.prior_grad import Prior, class_prior, energy_prior
from suite.modalities.shared.step_policy import (
    Arms,
    StepPolicy,
    assign,
    average_steps,
    batches,
    fit,
    policy_loss,
    reward,
    saved,
)
from suite.modalities.text.position_times import (
    LossTable,
    adaptive_times,
    buckets,
    importance,
    noised,
    soft_mask_times,
    update_kept,
)
from suite.plugins.solvers.ddim import DDIMSolver
from suite.testing.oracles import Gaussian, drive


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- PriorGrad ---------------------------------------------------------------------------------


def test_the_standard_prior_is_plain_diffusion_bit_for_bit() -> None:
    prior = Prior(torch.zeros(6), torch.ones(6))
    x0, z, guess = (normal(4, 6, seed=s).float() for s in range(3))
    alpha, sigma = VPLinear().alpha(0.3).float(), VPLinear().sigma(0.3).float()
    assert torch.equal(prior.noise(z), z)
    assert torch.equal(prior.noised(x0, z, alpha, sigma), alpha * x0 + sigma * z)
    assert torch.equal(prior.loss(z, guess), (z - guess).square().mean())
    assert torch.equal(prior.whiten(x0), x0) and torch.equal(prior.color(x0), x0)


def test_any_prior_is_plain_diffusion_in_whitened_coordinates() -> None:
    prior = Prior(normal(6), normal(6, seed=1).exp())
    x0, z, guess = (normal(4, 6, seed=s) for s in range(2, 5))
    noise = VPLinear()
    alpha, sigma = noise.alpha(0.3), noise.sigma(0.3)
    white = alpha * prior.whiten(x0) + sigma * z
    got = prior.noised(x0, prior.noise(z), alpha, sigma)
    torch.testing.assert_close(got / prior.deviation, white, rtol=0, atol=1e-10)
    loss = prior.loss(prior.noise(z), prior.noise(guess))
    torch.testing.assert_close(loss, (z - guess).square().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(prior.color(prior.whiten(x0)), x0, rtol=0, atol=1e-12)


def test_a_solver_in_whitened_coordinates_samples_the_data() -> None:
    # Data N(mean, deviation^2) are their own prior: white data N(0, 1), and the flow leaves white noise as it is.
    prior, noise = Prior(normal(5), normal(5, seed=1).exp()), VPLinear()
    z = normal(3, 5, seed=2)
    times = torch.linspace(1, 0, 401, dtype=torch.float64)
    white = drive(DDIMSolver(noise, 0.0), times, Gaussian(0.0, 1.0).denoiser(noise), z)
    torch.testing.assert_close(prior.color(white), prior.color(Gaussian(0.0, 1.0).flow_map(noise, z, 1.0, 0.0)),
                               rtol=0, atol=0.03)  # fmt: skip


def test_the_vocoders_prior_follows_the_energy() -> None:
    log_mel = torch.full((1, 80, 4), -20.0, dtype=torch.float64)
    log_mel[:, :, 2] = 0.0
    log_mel[:, :, 1] = math.log(0.5)
    prior = energy_prior(log_mel, hop=3)
    assert prior.deviation.shape == (1, 12) and not prior.mean.any()
    expected = torch.tensor([0.1] * 3 + [0.5] * 3 + [1.0] * 3 + [0.1] * 3, dtype=torch.float64)
    torch.testing.assert_close(prior.deviation[0], expected)
    silent = energy_prior(torch.full((1, 80, 2), -torch.inf), hop=2)
    assert (silent.deviation == 0.1).all()


def test_the_table_of_classes_has_their_moments() -> None:
    features, labels = normal(300, 3), torch.arange(300) % 2
    mean, deviation = class_prior(features, labels, 3)
    for c in (0, 1):
        torch.testing.assert_close(mean[c], features[labels == c].mean(0))
        torch.testing.assert_close(deviation[c], features[labels == c].std(0, correction=0))
    assert mean[2].tolist() == [0] * 3 and deviation[2].tolist() == [1] * 3
    with pytest.raises(ConfigError, match="deviations above 0"):
        Prior(torch.zeros(2), torch.tensor([1.0, 0.0]))


# ---- AdaDiff -----------------------------------------------------------------------------------


def test_one_arm_is_a_fixed_number_of_steps() -> None:
    arms = Arms((20,))
    policy = StepPolicy(4, arms)
    arm = policy.choose(normal(7, 4).float())
    assert batches(arm, arms) == {20: list(range(7))}
    assert average_steps(arm, arms) == 20 and saved(arm, arms) == 0
    logits = torch.zeros(7, 1, requires_grad=True)
    policy_loss(logits, arm, torch.ones(7)).backward()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_the_gradient_is_unbiased_whatever_the_baseline(baseline: float) -> None:
    # The expectation over the arms, by enumeration: sum_a p(a) grad of the estimate at a = grad of -sum_a p(a) r(a).
    worth = torch.tensor([0.2, 1.5, -0.7], dtype=torch.float64)
    logits = normal(1, 3).requires_grad_()
    (-(logits.softmax(-1) * worth).sum()).backward()
    assert logits.grad is not None
    exact = logits.grad.clone()
    total = torch.zeros_like(exact)
    for a, chance in enumerate(logits.softmax(-1)[0].tolist()):
        again = logits.detach().clone().requires_grad_()
        policy_loss(again, torch.tensor([a]), worth[a : a + 1], baseline).backward()
        assert again.grad is not None
        total += chance * again.grad
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-14)


def test_the_policy_learns_which_prompts_are_worth_more() -> None:
    arms = Arms((5, 20, 50))
    prompts = torch.cat([torch.eye(2).repeat(8, 1)])
    hard = prompts[:, 1] == 1
    quality = torch.stack([torch.where(hard, q, 1.0) for q in (0.2, 0.6, 1.0)], -1)
    worth = torch.stack([reward(quality[:, a], torch.full((16,), a), arms, 0.4) for a in range(3)], -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = StepPolicy(2, arms)
    fit(policy, prompts, worth)
    arm = policy.choose(prompts)
    assert (arm[hard] == 2).all() and (arm[~hard] == 0).all()
    assert average_steps(arm, arms) == 27.5 and saved(arm, arms) == pytest.approx(0.45)
    assert set(assign(policy, prompts, [str(k) for k in range(16)])) == {5, 50}


@pytest.mark.parametrize("steps", [(), (5, 5), (10, 5), (0, 5)])
def test_bad_arms_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising numbers of steps"):
        Arms(steps)


# ---- soft-masked words -------------------------------------------------------------------------

TEXTS = [[1, 2, 3, 1], [1, 4, 2], [1, 5, 6, 7, 8]]


def test_importance_is_two_shares() -> None:
    found = importance(TEXTS)
    assert [len(f) for f in found] == [4, 3, 5]
    for each in found:
        assert float(each.sum()) == pytest.approx(2) and (each > 0).all()
    # Words of one text that are rare elsewhere weigh more by tf-idf: 3 occurs in one text, 2 in two, once each here.
    idf = [math.log(4 / n) for n in (3, 2, 1, 3)]
    weight = torch.tensor([2 * idf[0], idf[1], idf[2], 2 * idf[3]], dtype=torch.float64)
    chance = torch.tensor([4, 2, 1, 4], dtype=torch.float64) / 12
    surprise = -chance * chance.log()
    torch.testing.assert_close(found[0], weight / weight.sum() + surprise / surprise.sum())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_buckets_are_monotone_in_importance(count: int) -> None:
    important = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.5, 0.2, 0.7])
    bucket = buckets(important, count)
    for a, b in itertools.permutations(range(7), 2):
        if important[a] > important[b]:
            assert bucket[a] <= bucket[b]
    sizes = bucket.bincount(minlength=count)
    assert sizes.max() - sizes.min() <= 1 and int(bucket.min()) == 0 and int(bucket.max()) == count - 1
    with pytest.raises(ConfigError, match="buckets for 7 words"):
        buckets(important, 8)


def test_words_whose_turn_has_not_come_are_untouched_and_all_are_noised_at_the_end() -> None:
    noise, bucket = Sqrt(), buckets(torch.arange(6.0), 3)
    times = soft_mask_times(torch.linspace(1, 0, 10, dtype=torch.float64), bucket, 3)
    check_timesteps(times, 9)
    x0, epsilon = normal(2, 6, 4), normal(2, 6, 4, seed=1)
    for row, t in zip(times, torch.linspace(1, 0, 10, dtype=torch.float64).tolist(), strict=True):
        x = noised(x0, epsilon, noise, row)
        waiting = bucket / 3 >= t - 1e-9
        assert torch.equal(x[:, waiting], x0[:, waiting])
        assert not torch.equal(x[:, ~waiting], x0[:, ~waiting]) or waiting.all()
        # The more important a word, the noisier it is.
        order = bucket.argsort(stable=True)
        assert (row[order].diff() <= 0).all()
    assert (times[0] == 1).all()
    torch.testing.assert_close(noised(x0, epsilon, noise, times[0]), noise.alpha(1.0) * x0 + noise.sigma(1.0) * epsilon)


def test_one_bucket_is_the_plain_schedule() -> None:
    times = torch.linspace(1, 0, 10, dtype=torch.float64)
    every = soft_mask_times(times, torch.zeros(5).long(), 1)
    assert torch.equal(every, times[:, None].expand(10, 5))


def test_solvers_take_times_of_each_word() -> None:
    # The flow of each word goes by its own times: the end is that of a run of that word alone.
    noise, target = Flow(), Gaussian()
    even = torch.linspace(1, 0, 9, dtype=torch.float64)
    times = soft_mask_times(even, torch.tensor([0, 1, 2]), 3)
    x = normal(2, 3, 4)
    stops = [(row.expand(2, -1)) for row in times]
    solver, got = DDIMSolver(noise, 0.0), x
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.solver import expand

    for t, s in itertools.pairwise(stops):
        moving = (s < t).to(x)[..., None]
        stepped, _ = solver.step(target.denoiser(noise), got, t.clamp(min=1e-9), s.minimum(t), None, SampleRng((0, 1)))
        got = moving * stepped + (1 - moving) * got
    assert expand(times[0], got).isfinite().all()
    for word in range(3):
        own = times[:, word].unique().flip(0)
        alone = drive(solver, own, target.denoiser(noise), x[:, word])
        torch.testing.assert_close(got[:, word], alone, rtol=0, atol=1e-10)


# ---- adaptive positions ------------------------------------------------------------------------

BINS = 201
EVEN = torch.linspace(0, 1, BINS, dtype=torch.float64)


def start() -> Tensor:
    """alpha_bar of a plain schedule, the same for three positions."""
    return (VPLinear().alpha(EVEN) ** 2)[:, None].repeat(1, 3)


def test_after_one_update_the_loss_is_linear_in_time() -> None:
    hardness = torch.tensor([1.0, 0.8, 3.0], dtype=torch.float64)

    def loss(kept: Tensor) -> Tensor:  # rises as less is kept, in another way at each position
        return (1 - kept) ** hardness

    new = update_kept(start(), loss(start()), fixed=1)
    assert torch.equal(new[:, 0], start()[:, 0])  # the first position is always known
    assert (new.diff(dim=0) <= 0).all()
    measured = loss(new)[:, 1:]
    line = measured[0] + EVEN[:, None] * (measured[-1] - measured[0])
    before = loss(start())[:, 1:]
    bent = (before - (before[0] + EVEN[:, None] * (before[-1] - before[0]))).abs().max()
    assert float((measured - line).abs().max()) < 2e-3 < 0.1 < float(bent)


def test_a_loss_that_is_linear_is_a_fixed_point() -> None:
    table = start()
    torch.testing.assert_close(update_kept(table, EVEN[:, None].expand(-1, 3)), table, rtol=0, atol=1e-9)


def test_a_loss_that_falls_is_taken_as_level() -> None:
    losses = EVEN[:, None].repeat(1, 3)
    losses[50:60] = 0.0
    new = update_kept(start(), losses)
    assert (new.diff(dim=0) <= 0).all() and new.isfinite().all()
    assert torch.equal(new[0], start()[0]) and torch.equal(new[-1], start()[-1])
    with pytest.raises(ConfigError, match="two tables"):
        update_kept(start(), losses[:5])


def test_adaptive_times_are_those_at_which_the_model_keeps_as_much() -> None:
    noise = VPLinear()
    table = update_kept(start(), (1 - start()) ** 2)[::20]
    times = adaptive_times(table, noise)
    check_timesteps(times, 10)
    torch.testing.assert_close(noise.alpha(times[1:-1]) ** 2, table.flip(0)[1:-1], rtol=1e-9, atol=1e-9)


def test_the_table_of_losses_is_their_mean() -> None:
    table = LossTable(3, 2)
    t, mask = torch.tensor([0.0, 0.1, 0.5, 1.0]), torch.ones(4, 2)
    mask[1, 1] = 0
    table.add(t, torch.tensor([[1.0, 2.0], [3.0, 9.0], [5.0, 6.0], [7.0, 8.0]]), mask)
    assert table.mean().tolist() == [[2.0, 2.0], [5.0, 6.0], [7.0, 8.0]]
    with pytest.raises(ConfigError, match="refresh later"):
        LossTable(3, 2).mean()
