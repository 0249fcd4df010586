"""Networks that share a run: exact on oracles, counted, equal to either one at the ends, and refused if they differ."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from suite.diffusion.denoiser import Cond, Counter, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import VE, Cosine, Flow, NoiseSchedule, VPLinear
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.diffusion.solver import Solver
from suite.errors import ConfigError, RuleError
from suite.network import Network
from suite.network.experts import Companion, Companions, Expert, switched
from suite.plugins.compress.experts import Experts
from suite.plugins.compress.t_stitch import TStitch
from suite.plugins.solvers.ddim import DDIM
from suite.plugins.solvers.dpmpp_2m import DPMpp2M
from suite.plugins.solvers.heun import Heun
from suite.rules import Member, Verdict, check, enforce
from suite.testing.oracles import Gaussian, Mixture, Target, a_run
from suite.wrap import Wrap

STEPS = 8
NOISES = [VPLinear(), Cosine(), VE(), Flow()]
SOLVERS = [DDIM(), DDIM(eta=1.0), Heun(), DPMpp2M()]


class Oracle(nn.Module):
    """An exact denoiser as a network: it is told 1000 t, or EDM's number for VE."""

    def __init__(self, target: Target, noise: NoiseSchedule) -> None:
        super().__init__()
        self.target, self.noise = target, noise
        self.seen: list[float] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = ((4 * time.double()).exp() / 80) ** (1 / 7) if isinstance(self.noise, VE) else time.double() / 1000
        self.seen.append(round(float(t[0]), 6))
        return self.target.denoiser(self.noise)(x.double(), t)


def call(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, time)


def companions(**modules: Oracle) -> Companions:
    return Companions(lambda name: Companion(name, f"hash of {name}", Network(modules[name]), call))


def run(
    noise: NoiseSchedule,
    solver: Solver,
    main: Oracle,
    wrap: Wrap | None = None,
    scale: float = 1.0,
    batched: bool = True,
) -> tuple[Tensor, Counter]:
    counter = Counter()
    bare = NetworkDenoiser(main, call, noise, Prediction.SAMPLE, torch.float64, counter)
    guided = Guidance(scale, batched=batched).wrap(switched(bare, wrap.experts if wrap else ()))
    x = SampleRng((0, 1)).normal((3,)).double() * float(noise.sigma(1.0))
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    cond = {"cond": {}, "uncond": {}}
    out = march(Problem(x, times, guided, cond, solver, noise, SampleRng((0, 1)), a_run(steps=STEPS, batch=2)))
    return out, counter


def oracles(noise: NoiseSchedule) -> tuple[Oracle, Oracle]:
    """Two that differ."""
    return Oracle(Mixture.two((3,)), noise), Oracle(Gaussian(), noise)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("plugin", SOLVERS, ids=str)
def test_the_same_denoiser_twice_is_the_denoiser(noise: NoiseSchedule, plugin: DDIM) -> None:
    solver = plugin.solver(noise, a_run(steps=STEPS))
    plain, counted = run(noise, solver, oracles(noise)[0])
    for switch in (TStitch("twin", 0.5), Experts("twin+twin", (0.8, 0.4))):
        wrap = switch.compress(Network(nn.Identity()), a_run(), companions(twin=oracles(noise)[0]))
        got, again = run(noise, solver, oracles(noise)[0], wrap)
        assert torch.equal(got, plain)
        assert (again.nfe, again.depth) == (counted.nfe, counted.depth)
        assert 0 < wrap.report().did < counted.depth


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("plugin", SOLVERS, ids=str)
def test_share_0_is_the_large_one_and_1_the_small_one(noise: NoiseSchedule, plugin: DDIM) -> None:
    solver = plugin.solver(noise, a_run(steps=STEPS))
    ends = [run(noise, solver, oracle)[0] for oracle in oracles(noise)]
    assert not torch.equal(*ends)
    for share, expected in zip((0.0, 1.0), ends, strict=True):
        large, small = oracles(noise)
        wrap = TStitch("small", share).compress(Network(large), a_run(), companions(small=small))
        assert torch.equal(run(noise, solver, large, wrap)[0], expected)
        report = wrap.report()
        assert (report.did == 0) == (share == 0.0) == bool(report.reason)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("plugin", SOLVERS, ids=str)
def test_the_cost_is_the_sum_of_the_steps(share: float, plugin: DDIM) -> None:
    """All evaluations of the first round(share n) steps are the small one's, both of a Heun step included."""
    noise, (large, small) = VPLinear(), oracles(VPLinear())
    solver = plugin.solver(noise, a_run(steps=STEPS))
    wrap = TStitch("small", share).compress(Network(large), a_run(), companions(small=small))
    _, counter = run(noise, solver, large, wrap)
    first = round(share * STEPS)
    a_step = solver.facts.evaluations
    assert len(small.seen) == a_step * first == wrap.report().did
    assert len(small.seen) + len(large.seen) == counter.depth == solver.evaluations(STEPS)


def test_a_stitched_run_is_the_one_network_and_then_the_other() -> None:
    noise, (large, small) = VPLinear(), oracles(VPLinear())
    solver = DDIM().solver(noise, a_run())
    wrap = TStitch("small", 0.5).compress(Network(large), a_run(), companions(small=small))
    got, _ = run(noise, solver, large, wrap)
    x = SampleRng((0, 1)).normal((3,)).double() * float(noise.sigma(1.0))
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        target = small.target if k < STEPS // 2 else large.target
        x, _ = solver.step(target.denoiser(noise), x, t, s, None, SampleRng((0, 1)))
    assert torch.allclose(got, x, rtol=0, atol=1e-6)  # the network is told its time in float32


@pytest.mark.parametrize("plugin", [DDIM(), Heun()], ids=str)
def test_one_expert_an_evaluation_and_exact_bounds(plugin: DDIM) -> None:
    """A time that is a bound belongs to the range below it."""
    noise, main = VPLinear(), oracles(VPLinear())[0]
    noisy, middle = oracles(noise)
    options = Experts("noisy+middle", (0.75, 0.25))
    wrap = options.compress(Network(main), a_run(), companions(noisy=noisy, middle=middle))
    _, counter = run(noise, plugin.solver(noise, a_run(steps=STEPS)), main, wrap)
    assert all(t > 0.75 for t in noisy.seen) and all(0.25 < t <= 0.75 for t in middle.seen)
    assert all(t <= 0.25 for t in main.seen) and 0.75 in middle.seen and 0.25 in main.seen
    assert len(noisy.seen) + len(middle.seen) + len(main.seen) == counter.depth
    facts = wrap.report().facts["models"]
    assert [(f["name"], f["depth"], f["sha256"]) for f in facts] == [
        ("noisy", len(noisy.seen), "hash of noisy"), ("middle", len(middle.seen), "hash of middle"),
    ]  # fmt: skip
    assert wrap.report().did == 0, "a report is of the evaluations since the last one"


@pytest.mark.parametrize(("batched", "depth"), [(True, 8), (False, 16)])
def test_branches_are_counted_as_everywhere(batched: bool, depth: int) -> None:
    noise, (large, small) = Flow(), oracles(Flow())
    wrap = TStitch("small", 0.5).compress(Network(large), a_run(), companions(small=small))
    _, counter = run(noise, DDIM().solver(noise, a_run()), large, wrap, scale=2.0, batched=batched)
    assert (counter.nfe, counter.depth) == (16, depth)
    (facts,) = wrap.report().facts["models"]
    assert (facts["nfe"], facts["depth"]) == (8, depth / 2)


def test_without_experts_the_denoiser_is_itself() -> None:
    bare = NetworkDenoiser(nn.Identity(), call, Flow(), Prediction.SAMPLE, torch.float32, Counter())
    assert switched(bare, ()) is bare


def test_the_first_expert_that_takes_a_call_answers() -> None:
    noise, (a, b) = Flow(), oracles(Flow())
    opened = companions(a=a, b=b)
    both = [Expert(opened.open(n), lambda call: True, Counter()) for n in "ab"]
    _, _ = run(noise, DDIM().solver(noise, a_run()), oracles(noise)[0], Wrap(report=lambda: None, experts=tuple(both)))
    assert (both[0].tally.depth, both[1].tally.depth) == (STEPS, 0)


@pytest.mark.parametrize(("cls", "options"), [
    (TStitch, {"model": "", "share": 0.5}), (TStitch, {"model": "a", "share": 1.2}),
    (Experts, {"models": "", "bounds": ()}), (Experts, {"models": "a", "bounds": (0.5, 0.2)}),
    (Experts, {"models": "a+b", "bounds": (0.2, 0.5)}), (Experts, {"models": "a", "bounds": (1.0,)}),
    (Experts, {"models": "a+", "bounds": (0.5, 0.2)}),
])  # fmt: skip
def test_options_out_of_range(cls: type, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        cls(**options)


def chain(*words: str) -> Sequence[Member]:
    return [
        Member("t-stitch", "compress", frozenset({"denoiser-switch"})),
        Member("cache", "cache", frozenset(words)),
    ]


def test_reuse_across_the_switch_is_warned_about() -> None:
    found = check(chain("denoiser-output", "step-reuse"))
    assert [f.rule.id for f in found] == ["S1"] and found[0].rule.verdict is Verdict.WARN
    assert not check(chain("block-outputs", "step-reuse"))


def test_distillation_has_no_first_steps() -> None:
    distilling = Member("this run (distill)", "run", frozenset({"distill"}))
    stitch, experts = (Member(p.summary, "compress", p.effects) for p in (TStitch("same"), Experts("same", (0.5,))))
    with pytest.raises(RuleError, match="rule S2"):
        enforce([stitch, distilling])
    assert not enforce([experts, distilling])
