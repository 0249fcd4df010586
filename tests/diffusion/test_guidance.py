"""Guidance: on x0 it is what it is on epsilon, and it evaluates no branch that it does not use."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond, rows
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, VPLinear
from suite.diffusion.prediction import Prediction, from_x0
from suite.errors import ConfigError
from suite.testing import Gaussian

X = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]


@dataclass
class Oracle:
    """A denoiser whose data are Gaussian around the conditioning."""

    noise: NoiseSchedule
    calls: list[Call] = field(default_factory=list)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        self.calls.append(call)
        plain = Gaussian(0.0, 0.25).denoiser(self.noise)
        shift = cond["mean"]
        return plain(x - self.noise.alpha(t) * shift, t) + shift


def conds(batch: int = 8) -> dict[str, Cond]:
    ramp = torch.arange(batch, dtype=torch.float64)[:, None]
    return {"cond": {"mean": 0.5 + 0.1 * ramp, "flag": None}, "uncond": {"mean": -0.2 * ramp, "flag": None}}


def call(t: float = 0.5) -> Call:
    return Call(3, 10, t, t - 0.1, run_id="r")


@pytest.mark.parametrize("noise", [VPLinear(), VE(), Flow(), Cosine()], ids=lambda n: n.family)
def test_on_x0_is_on_epsilon(noise: NoiseSchedule) -> None:
    t = noise.time_at(torch.tensor(0.5, dtype=torch.float64))
    scale, oracle, both = 7.5, Oracle(noise), conds()
    x0 = Guidance(scale).wrap(oracle).denoise(X, t, both, call())
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    eps = {b: from_x0(Prediction.EPSILON, oracle.denoise(X, t, both[b], call()), X, alpha, sigma) for b in both}
    guided = eps["uncond"] + scale * (eps["cond"] - eps["uncond"])
    torch.testing.assert_close(from_x0(Prediction.EPSILON, x0, X, alpha, sigma), guided, rtol=1e-14, atol=1e-14)


def test_batched_is_separate() -> None:
    t = torch.tensor(0.5, dtype=torch.float64)
    one, two = Oracle(Flow()), Oracle(Flow())
    together = Guidance(3.0).wrap(one).denoise(X, t, conds(), call())
    apart = Guidance(3.0, batched=False).wrap(two).denoise(X, t, conds(), call())
    assert torch.equal(together, apart)
    assert [c.branch for c in one.calls] == ["cond+uncond"]
    assert one.calls[0].branches == ("cond", "uncond")
    assert [c.branch for c in two.calls] == ["cond", "uncond"]
    assert {(c.step, c.t, c.run_id) for c in (*one.calls, *two.calls)} == {(3, 0.5, "r")}


def test_batched_times_follow_their_rows() -> None:
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    seen = []

    class Spy:
        def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
            seen.append(t)
            return x

    Guidance(3.0).wrap(Spy()).denoise(X, t, conds(), call(0.9))
    assert torch.equal(seen[0], torch.cat([t, t]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_scale_one_evaluates_one_branch(scale: float) -> None:
    oracle = Oracle(Flow())
    out = Guidance(scale).wrap(oracle).denoise(X, torch.tensor(0.5).double(), conds(), call())
    assert oracle.calls[0].branch == ("cond" if scale == 1 else "cond+uncond")
    if scale != 3:
        branch = "cond" if scale == 1 else "uncond"
        plain = Oracle(Flow()).denoise(X, torch.tensor(0.5).double(), conds()[branch], call())
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("t", "acts"), [(0.19, False), (0.2, True), (0.5, True), (0.8, True), (0.81, False)])
def test_interval(t: float, acts: bool) -> None:
    oracle = Oracle(Flow())
    Guidance(3.0, (0.2, 0.8)).wrap(oracle).denoise(X, torch.tensor(t).double(), conds(), call(t))
    assert len(oracle.calls[0].branches) == (2 if acts else 1)


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_interval_must_lie_in_time(interval: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="two increasing times"):
        Guidance(3.0, interval)


def test_rows_of_a_conditioning() -> None:
    part = rows(conds()["cond"], 2, 4)
    assert part["mean"].shape == (2, 1) and part["flag"] is None


class TokenOracle:
    """Fixed probabilities of three tokens and a mask, by branch; the first place is known."""

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        del x, t, call
        return cond["p"]


def token_conds() -> dict[str, Cond]:
    known = [0.0, 1.0, 0.0, 0.0]
    cond = torch.tensor([[known, [0.6, 0.3, 0.1, 0.0], [0.5, 0.5, 0.0, 0.0]]])
    uncond = torch.tensor([[known, [0.3, 0.3, 0.4, 0.0], [0.2, 0.2, 0.6, 0.0]]])
    return {"cond": {"p": cond}, "uncond": {"p": uncond}}


@pytest.mark.parametrize("batched", [True, False])
def test_tokens_are_guided_in_logarithms(batched: bool) -> None:
    tokens, t = torch.tensor([[1, 3, 3]]), torch.tensor(0.5, dtype=torch.float64)
    out = Guidance(2.0, batched=batched, tokens=True).wrap(TokenOracle()).denoise(tokens, t, token_conds(), call())
    expected = torch.tensor([0.6**2 / 0.3, 0.3**2 / 0.3, 0.1**2 / 0.4, 0.0])
    torch.testing.assert_close(out[0, 1], expected / expected.sum())
    assert out[0, 0].tolist() == [0, 1, 0, 0]
    assert out[0, 2, 2:].tolist() == [0, 0], "what the condition rules out stays impossible"
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 3))


def test_tokens_guided_as_vectors_would_not_be_probabilities() -> None:
    tokens, t = torch.tensor([[1, 3, 3]]), torch.tensor(0.5, dtype=torch.float64)
    assert Guidance(4.0).wrap(TokenOracle()).denoise(tokens, t, token_conds(), call()).min() < 0


@pytest.mark.parametrize(("share", "steps"), [(1.0, 10), (0.3, 3), (0.31, 4), (0.0, 0)])
def test_guidance_may_end(share: float, steps: int) -> None:
    """Both branches are evaluated in the first share of the steps, rounded up; then x0 is the conditional one."""
    oracle, t = Oracle(Flow()), torch.tensor(0.5, dtype=torch.float64)
    guided, both = Guidance(3.0, share=share).wrap(oracle), conds()
    for step in range(10):
        x0 = guided.denoise(X, t, both, Call(step, 10, 0.5, 0.4))
        if step >= steps:
            assert torch.equal(x0, Oracle(Flow()).denoise(X, t, both["cond"], call()))
    assert [c.branch for c in oracle.calls] == ["cond+uncond"] * steps + ["cond"] * (10 - steps)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match="guidance share"):
        Guidance(3.0, share=share)


# ---- edges -----------------------------------------------------------------------------------------


def acting(guidance: Guidance, times: Tensor) -> list[int]:
    """The steps of a grid in which both branches are evaluated."""
    steps = len(times) - 1
    calls = [Call(k, steps, float(times[k]), float(times[k + 1])) for k in range(steps)]
    return [c.step for c in calls if len(guidance.branches(c)) == 2]


@pytest.mark.parametrize("steps", range(1, 61))
def test_a_step_exactly_at_an_end_is_inside(steps: int) -> None:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for k in range(steps):
        t = (steps - k) / steps  # as a user writes it: the grid's own 0.3 has another last bit
        assert acting(Guidance(3.0, (t, t)), times) == [k]
        assert acting(Guidance(3.0, (t, 1.0)), times) == list(range(k + 1))
        assert acting(Guidance(3.0, (0.0, t)), times) == list(range(k, steps))


def test_what_acts_in_no_step_is_no_guidance_and_costs_one_branch() -> None:
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    for guidance in (Guidance(3.0, (0.31, 0.39)), Guidance(3.0, (0.0, 0.0)), Guidance(3.0, share=0.0), Guidance(1.0)):
        assert acting(guidance, times) == []
    oracle = Oracle(Flow())
    t, both = torch.tensor(0.5, dtype=torch.float64), conds()
    outs = [g.wrap(oracle).denoise(X, t, both, call()) for g in (Guidance(3.0, (0.31, 0.39)), Guidance(1.0))]
    assert torch.equal(*outs)
    assert [c.branch for c in oracle.calls] == ["cond", "cond"]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="expected a number"):
        Guidance(scale)
    with pytest.raises(ConfigError, match="two increasing times"):
        Guidance(3.0, (0.0, float("nan")))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.5, 1.5, 7.0, 100.0])
def test_guided_tokens_are_probabilities_at_any_scale(scale: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    p = torch.rand(2, 3, 5, 8, generator=rng) ** 4
    p = p.where(torch.rand(p.shape, generator=rng) > 0.3, 0.0)  # much that one branch or the other rules out
    p[..., 0] += 1e-3
    cond, uncond = (p / p.sum(-1, keepdim=True)).unbind(0)
    got = Guidance(scale, tokens=True).wrap(TokenOracle()).denoise(
        torch.zeros(3, 5).long(), torch.tensor(0.5).double(), {"cond": {"p": cond}, "uncond": {"p": uncond}}, call()
    )  # fmt: skip
    assert bool(got.isfinite().all()) and bool((got >= 0).all())
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 5))
    assert bool((got[cond == 0] == 0).all())
    if scale == 0:  # the unconditional branch, of what the condition allows
        allowed = uncond.where(cond > 0, 0.0)
        torch.testing.assert_close(got, allowed / allowed.sum(-1, keepdim=True))


def test_tokens_outside_the_interval_are_those_of_the_condition() -> None:
    guidance, both = Guidance(3.0, (0.2, 0.8), tokens=True), token_conds()
    for t, inside in ((0.9, False), (0.8, True), (0.2, True), (0.1, False)):
        x, time = torch.zeros(1, 3).long(), torch.tensor(t).double()
        out = guidance.wrap(TokenOracle()).denoise(x, time, both, call(t))
        assert torch.equal(out, both["cond"]["p"]) is not inside
