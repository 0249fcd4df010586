"""Forecast caches: their weights, what they do to a solver's order and to its variance, and that order 0 is FORA."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.call import Call
from suite.diffusion.noise import Cosine, Flow, Masked, NoiseSchedule, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, bind
from suite.diffusion.solver import Denoise, Solver
from suite.errors import ConfigError, RuleError
from suite.host.discovery import Entry
from suite.host.manager import Active, Manager
from suite.plugin import Plugin, build
from suite.plugins.cache._forecast import blend, weights
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.forecast import Forecast
from suite.plugins.cache.taylorseer import TaylorSeer
from suite.plugins.solvers.ddim import DDIM
from suite.plugins.solvers.deis import DEIS
from suite.plugins.solvers.dpmpp_2m import DPMpp2M
from suite.plugins.solvers.heun import Heun
from suite.rules import Member, Verdict, check
from suite.testing import Tiny
from suite.testing.oracles import Gaussian, a_run, drive, log_snr_times, moments, slope

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import CASES, Setup

NETWORKS = list(CASES)
CHAINS = [name for name in NETWORKS if name != "unet"]
ROUNDING = 2e-5
#: Forecasts that act on every network; the residual ones on chains of blocks.
ACTING = [(name, TaylorSeer(3)) for name in NETWORKS] + [
    (name, TaylorSeer(3, order=2, level="residual", form="adams")) for name in CHAINS
]


def identify(value: Any) -> str:
    return value if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'level', '')}"


acting = pytest.mark.parametrize(("name", "plugin"), ACTING, ids=identify)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= ROUNDING


# ---- weights -----------------------------------------------------------------------------------

UNEVEN = (0.5, 0.62, 0.81, 0.99)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_adams_is_exact_for_polynomials_on_uneven_times(order: int) -> None:
    nodes = UNEVEN[: order + 1]
    for power in range(order + 1):
        got = sum(w * n**power for w, n in zip(weights("adams", nodes, 0.31), nodes, strict=True))
        assert got == pytest.approx(0.31**power, abs=1e-12)
    missed = sum(w * n ** (order + 1) for w, n in zip(weights("adams", nodes, 0.31), nodes, strict=True))
    assert abs(missed - 0.31 ** (order + 1)) > 1e-3


def test_on_even_times_adams_is_ab_cache() -> None:
    """AB-Cache: (-1)^i C(m + 1, i + 1), one step after the newest."""
    for order in range(4):
        nodes = [0.5 + 0.1 * i for i in range(order + 1)]
        expected = [(-1) ** i * math.comb(order + 1, i + 1) for i in range(order + 1)]
        assert weights("adams", nodes, 0.4) == pytest.approx(expected)


def test_taylor_is_the_papers_sum() -> None:
    n0, n1, n2 = UNEVEN[:3]
    first, before = 1 / (n0 - n1), 1 / (n1 - n2)
    x = 0.31 - n0
    second = [first / (n0 - n1), -(first + before) / (n0 - n1), before / (n0 - n1)]
    expected = [a + b for a, b in zip((1 + x * first, -x * first, 0), (x * x / 2 * s for s in second), strict=True)]
    assert weights("taylor", (n0, n1, n2), 0.31) == pytest.approx(expected)
    assert weights("taylor", (n0, n1), 0.31) == pytest.approx(weights("adams", (n0, n1), 0.31))


def test_hermite_damps_the_slope_unless_its_scale_says_not_to() -> None:
    nodes, x = UNEVEN[:2], 0.31 - UNEVEN[0]
    slope_of = (x / (nodes[0] - nodes[1]), -x / (nodes[0] - nodes[1]))
    for scale in (0.3, 0.5, 1.0):
        expected = [1 + 2 * scale**2 * slope_of[0], 2 * scale**2 * slope_of[1]]
        assert weights("hermite", nodes, 0.31, scale) == pytest.approx(expected)
    assert weights("hermite", nodes, 0.31, math.sqrt(0.5)) == pytest.approx(weights("taylor", nodes, 0.31))


@pytest.mark.parametrize("form", ["taylor", "adams", "hermite"])
def test_weights_sum_to_one(form: Any) -> None:
    for count in range(1, 5):
        assert sum(weights(form, UNEVEN[:count], 0.2, 0.4)) == pytest.approx(1.0)


def test_blend_keeps_structure_and_dtype() -> None:
    one, two = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16)
    got = blend([2.0, -1.0], [(one, None, [one]), (two, None, [two])])
    assert got[1] is None and got[0].dtype is torch.bfloat16 and got[0].item() == -1.0 and got[2][0].item() == -1.0
    assert blend([1.0], [one]) is one


# ---- the law: a forecast of order m caps the order at min(p, m + 1) ----------------------------


class Exact:
    """A denoiser of known data, as the plugins see it."""

    def __init__(self, denoise: Denoise) -> None:
        self.known = denoise

    def denoise(self, x: Tensor, t: Tensor, cond: Any, call: Call) -> Tensor:
        return self.known(x, t)


def forecast_of(plugin: Forecast, noise: NoiseSchedule, times: Tensor, target: Gaussian) -> Denoise:
    """The target's denoiser under the plugin, as a solver of one evaluation a step sees it on this grid."""
    wrap, exact = plugin.cache(noise=noise), Exact(target.denoiser(noise))
    denoiser = wrap.denoiser(exact) if wrap.denoiser else exact
    grid = times.tolist()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        step = grid.index(float(t))
        return denoiser.denoise(x, t, {}, Call(step, len(grid) - 1, float(t), grid[step + 1]))

    return denoise


def observed(solver: Solver, plugin: Forecast, noise: NoiseSchedule, grid: Any, steps: Sequence[int]) -> float:
    """Order in the step size of a solver with exact first steps, under the plugin."""
    target, errors = Gaussian(), []
    for count in steps:
        times = grid(noise, count)
        start = torch.tensor([[-1.3], [0.4], [1.9]], dtype=torch.float64) * noise.sigma(times[0])
        denoise, state, x = forecast_of(plugin, noise, times, target), solver.begin(a_run(steps=count), times), start
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            x, state = solver.step(denoise, x, t, s, state, SampleRng((0, 1, 2)))
            if index < plugin.warmup:  # an order is defined with exact starting values
                x = target.flow_map(noise, start, times[0], s)
        errors.append(float((x - target.flow_map(noise, start, times[0], times[-1])).abs().max()))
    return slope(steps, errors)


def uneven(noise: NoiseSchedule, steps: int) -> Tensor:
    """Log-SNR steps that are in turn long and short: not smooth, so that counting steps would be wrong."""
    gaps = torch.tensor([1.5, 0.5, 0.8, 1.2]).double().repeat(steps // 4)
    levels = torch.cat([torch.zeros(1).double(), gaps.cumsum(0)]) / gaps.sum() * 8 - 4
    return noise.time_at(levels)


STEPS = (80, 160, 320, 640)


@pytest.mark.parametrize("grid", [log_snr_times, uneven], ids=["even", "uneven"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_caps_the_order(order: int, grid: Any) -> None:
    """Adams-Bashforth of order 3 with every second evaluation forecast: order m + 1."""
    noise = VPLinear()
    plugin = Forecast(2, order, warmup=6, form="adams", quantity="epsilon")
    got = observed(DEIS(3).solver(noise, a_run()), plugin, noise, grid, STEPS)
    assert got == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize(("form", "order", "expected"), [("taylor", 1, 2), ("taylor", 2, 2), ("hermite", 1, 1)])
def test_forms_that_do_not_reach_their_degree(form: Any, order: int, expected: int) -> None:
    """Nested differences are derivatives to first order, so the paper's form stays at 2; a damped slope is no slope."""
    noise = VPLinear()
    plugin = Forecast(2, order, warmup=6, form=form, quantity="epsilon")
    assert observed(DEIS(3).solver(noise, a_run()), plugin, noise, log_snr_times, STEPS) == pytest.approx(
        expected, abs=0.15
    )


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_solver_of_order_one_stays_there(order: int) -> None:
    """min(p, m + 1) with p = 1."""
    noise = VPLinear()
    plugin = Forecast(2, order, warmup=6)
    assert observed(DDIM().solver(noise, a_run()), plugin, noise, log_snr_times, STEPS) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("noise", [VPLinear(), Cosine(), Flow()], ids=lambda n: n.family)
@pytest.mark.parametrize("quantity", ["sample", "epsilon", "flow_prediction"])
def test_repeating_is_ddim_with_fewer_steps(quantity: Any, noise: NoiseSchedule) -> None:
    """C1: reuse over 4 of 80 steps is DDIM with 20; nothing is gained over fewer steps."""
    times, target = log_snr_times(noise, 80), Gaussian()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = DDIM().solver(noise, a_run())
    reused = drive(solver, times, forecast_of(Forecast(4, 0, quantity=quantity), noise, times, target), x)
    fewer = drive(solver, times[::4], target.denoiser(noise), x)
    assert float((reused - fewer).abs().max()) < 1e-12


# ---- C3: reuse and fresh noise, by an exact recursion -------------------------------------------


@pytest.mark.parametrize("noise", [VPLinear(), Cosine()], ids=lambda n: n.family)
def test_repeating_v_is_another_method_of_first_order(noise: NoiseSchedule) -> None:
    """A DDIM step keeps x0 and epsilon, and v = alpha epsilon - sigma x0 turns with alpha and sigma."""
    target, plugin = Gaussian(), Forecast(4, 0, quantity="v_prediction")
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver, times = DDIM().solver(noise, a_run()), log_snr_times(noise, 80)
    reused = drive(solver, times, forecast_of(plugin, noise, times, target), x)
    fewer = drive(solver, times[::4], target.denoiser(noise), x)
    assert float((reused - fewer).abs().max()) > 1e-3
    assert observed(solver, plugin, noise, log_snr_times, STEPS) == pytest.approx(1, abs=0.15)


def recursion(noise: NoiseSchedule, times: Tensor, variance: float, interval: int, eta: float, quantity: str) -> float:
    """Variance of DDIM(eta) with a reused prediction: covariance of (x, what is kept), step by step."""
    alpha, sigma = noise.alpha(times).tolist(), noise.sigma(times).tolist()
    xx, xk, kk = alpha[0] ** 2 * variance + sigma[0] ** 2, 0.0, 0.0
    for i in range(len(times) - 1):
        (a, b), (s, r) = alpha[i : i + 2], sigma[i : i + 2]
        if i % interval == 0:
            gain = a * variance / (a * a * variance + s * s)  # x0 = gain x
            kept = (1 - a * gain) / s if quantity == "epsilon" else gain
            xk, kk = kept * xx, kept * kept * xx
        tau = eta * math.sqrt(max(0.0, r * r * (1 - (a * r / (b * s)) ** 2)))
        rest = math.sqrt(r * r - tau * tau)
        # x' = b x0 + rest eps + tau z, with one of x0 and eps kept and the other from x = a x0 + s eps.
        if quantity == "epsilon":
            c, d = b / a, rest - b * s / a
        else:
            c, d = rest / s, b - rest * a / s
        xx, xk = c * c * xx + 2 * c * d * xk + d * d * kk + tau * tau, c * xk + d * kk
    return xx


@pytest.mark.parametrize("quantity", ["sample", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "interval"), [(16, 1), (16, 2), (16, 4), (64, 4)])
def test_the_variance_under_reuse_is_the_exact_one(quantity: Any, eta: float, steps: int, interval: int) -> None:
    noise, target = VPLinear(), Gaussian(0.0, 0.25)
    times = log_snr_times(noise, steps, -8, 8)
    start = target.marginal(noise, times[0])[1]
    denoise = forecast_of(Forecast(interval, 0, quantity=quantity), noise, times, target)
    _, got = moments(DDIM(eta).solver(noise, a_run()), times, denoise, torch.zeros(()).double(), start)
    assert float(got) == pytest.approx(recursion(noise, times, 0.25, interval, eta, quantity), rel=1e-9)


def test_reused_epsilon_keeps_the_fresh_noise() -> None:
    """What C3 forbids: relative error of the variance. Reusing x0 instead is fewer ancestral steps, in law."""
    noise, target = VPLinear(), Gaussian(0.0, 0.25)

    def error(steps: int, interval: int, eta: float, quantity: str) -> float:
        times = log_snr_times(noise, steps, -8, 8)
        return recursion(noise, times, 0.25, interval, eta, quantity) / float(target.marginal(noise, times[-1])[1]) - 1

    assert [round(error(16, n, 1.0, "epsilon"), 2) for n in (1, 2, 4)] == [-0.37, -0.27, 10.08]
    assert [round(error(64, n, 1.0, "epsilon"), 2) for n in (1, 2, 4)] == [-0.12, -0.11, -0.08]
    assert error(64, 4, 1.0, "sample") == pytest.approx(error(16, 1, 1.0, "sample"))
    for quantity in ("sample", "epsilon"):  # without noise, either is fewer steps
        assert error(64, 4, 0.0, quantity) == pytest.approx(error(16, 1, 0.0, quantity))


# ---- rules -------------------------------------------------------------------------------------


def active(name: str, plugin: Plugin, hook: str) -> Active:
    target = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
    return Active(Entry(name, target, "under test", "0"), plugin, hook, name)


def found(solver: Plugin, plugin: Plugin) -> dict[str, Verdict]:
    chain = [active("the-solver", solver, "solver").member, active("the-cache", plugin, "cache").member]
    return {f.rule.id: f.rule.verdict for f in check(chain)}


def test_rules_of_order_and_noise() -> None:
    whole, residual = Forecast(), TaylorSeer(level="residual")
    assert found(DPMpp2M(), whole) == {"C2": Verdict.WARN}
    assert found(DDIM(1.0), whole) == {"C3": Verdict.FORBID}
    assert found(DDIM(1.0), residual) == {"D1": Verdict.FORBID, "C3b": Verdict.WARN}
    assert found(DDIM(1.0), TaylorSeer()) == {"C3b": Verdict.WARN}
    for plugin in (whole, residual, TaylorSeer()):
        assert found(DDIM(), plugin) == {}


def test_rules_of_grids_ranks_and_other_caches() -> None:
    """Static: ranks may split samples (C6, C7); an optimised grid is a warning (C27), another cache an error (C36)."""
    for plugin in (Forecast(), TaylorSeer(), TaylorSeer(level="residual")):
        for words, expected in (
            ("branch-axis", []),
            ("patch-axis", []),
            ("optimised-grid", ["C27"]),
            ("distill", ["C33"]),
        ):
            chain = [Member("it", "cache", plugin.effects), Member("other", "run", frozenset({words}))]
            assert [f.rule.id for f in check(chain)] == expected
    chain = [Member(str(k), "cache", p.effects) for k, p in enumerate((TaylorSeer(), FORA()))]
    assert [f.rule.id for f in check(chain)] == ["C36"]
    chain = [Member(str(k), "cache", p.effects) for k, p in enumerate((Forecast(), Forecast()))]
    assert [f.rule.id for f in check(chain)] == ["C36b"]


@pytest.mark.parametrize("plugin", [TaylorSeer(3), TaylorSeer(3, level="residual"), FORA(3)], ids=identify)
def test_a_compiled_network_gives_what_a_plain_one_gives(plugin: Plugin) -> None:
    """C30: the cache is enabled first; decisions and what is kept are Python's, around the graphs."""
    setup = Setup("pixart", steps=6)
    expected, plain = setup.cached(plugin, (0, 1))
    with setup.applied(plugin, seeds=(0, 1)) as wraps:
        setup.module.compile(backend="eager")
        try:
            out = setup.generate((0, 1), wraps)
        finally:
            setup.module._compiled_call_impl = None
            torch._dynamo.reset()
    assert close(out, expected) and wraps[0].report().did == plain.did


def test_refusals_say_why() -> None:
    for plugin, reason in ((Forecast(), "does not see the solver's fresh noise"), (TaylorSeer(level="residual"), "D1")):
        with pytest.raises(RuleError, match=reason):
            Manager([active("ddim", DDIM(1.0), "solver"), active("it", plugin, "cache")]).enforce_rules([])


# ---- taylorseer on networks ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", ["taylor", "adams", "hermite"])
def test_order_zero_is_fora(name: str, form: Any) -> None:
    setup = Setup(name, guidance=3.0)
    assert torch.equal(
        setup.cached(TaylorSeer(3, 0, last=2, form=form), (0, 1))[0], setup.cached(FORA(3, last=2), (0, 1))[0]
    )


@acting
def test_off_is_bit_identical(name: str, plugin: TaylorSeer) -> None:
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1))
    for off in (
        TaylorSeer(1, level=plugin.level),
        TaylorSeer(4, last=8, level=plugin.level),
        TaylorSeer(4, warmup=8, level=plugin.level),
    ):
        out, report = setup.cached(off, (0, 1))
        assert torch.equal(out, plain) and report.did == 0 and report.reason
    assert TaylorSeer(1).lossless and not TaylorSeer(2).lossless


@acting
def test_runs_rows_and_undo(name: str, plugin: TaylorSeer) -> None:
    """Two runs are equal; a batch of two is two singles; branches may be one batch or apart; undo restores."""
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((3, 4))
    one, two = (setup.cached(plugin, (3, 4)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert one[1].did > 0 and 0 < one[1].facts["skipped_share"] < 1 and one[1].facts["bytes_held"] > 0
    assert not torch.equal(one[0], plain)
    # Extrapolation makes rounding errors larger by the sum of its weights.
    alone = torch.cat([setup.cached(plugin, (seed,))[0] for seed in (3, 4)])
    apart, _ = Setup(name, guidance=3.0, batched=False).cached(plugin, (3, 4))
    assert float((one[0] - alone).abs().max()) < 20 * ROUNDING and float((one[0] - apart).abs().max()) < 20 * ROUNDING
    assert not any("forward" in m.__dict__ for m in setup.module.modules())
    assert torch.equal(setup.generate((3, 4)), plain)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "unet"])
def test_calls_are_counted_from_below(name: str) -> None:
    setup = Setup(name, steps=8)
    with _tiny.counting(setup.network, "attention", "cross_attention", "mlp") as seen:
        _, report = setup.cached(TaylorSeer(3, warmup=2, last=1))
    assert set(seen.calls.values()) == {5}  # 0, 1, 3, 6 and 7
    assert report.did == 3 * len(seen.calls) and report.facts["misses"] == 5 * len(seen.calls)


def test_the_residual_skips_every_block() -> None:
    setup = Setup("cogvideox", steps=8)
    with _tiny.counting(setup.network, "block") as seen:
        _, report = setup.cached(TaylorSeer(3, level="residual"), (0, 1))
    assert set(seen.calls.values()) == {3}  # 0, 3 and 6
    assert report.facts["hits_by_step"] == [0, 2, 2, 0, 2, 2, 0, 2] and report.did == 10 * 3


def test_two_evaluations_a_step() -> None:
    """Heun on six steps: the second evaluation is missing from the last step and has a history of its own."""
    setup = Setup("pixart", steps=6, solver="heun")
    with _tiny.counting(setup.network, "mlp") as seen:
        setup.cached(TaylorSeer(2))
    assert set(seen.calls.values()) == {6}  # as FORA's: 0, 2, 4 and, of the second, 1, 2 and 4


def test_guidance_in_an_interval_forgets() -> None:
    """Branches of the eight steps: c c c j j j c c. What `cond` gave at step 0 says nothing at step 6."""
    setup = Setup("pixart", guidance=3.0, interval=(0.3, 0.7))
    with _tiny.counting(setup.network, "mlp") as seen:
        out, _ = setup.cached(TaylorSeer(4))
    assert set(seen.calls.values()) == {4} and out.isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
def test_diffusers_own(order: int) -> None:
    """On an even grid the form `taylor` is diffusers' TaylorSeer, which counts steps."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, apply_taylorseer_cache

    setup = Setup("pixart", steps=12)
    ours, _ = setup.cached(TaylorSeer(3, order, warmup=2))
    names = [ref.name for ref in setup.network.blocks("attention", "cross_attention", "mlp")]
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[name.replace(".", r"\.") for name in names],
    )
    apply_taylorseer_cache(setup.module, config)
    registries: list[HookRegistry] = [
        m._diffusers_hook for m in setup.module.modules() if hasattr(m, "_diffusers_hook")
    ]
    try:
        _set_cache_context(setup.module, CacheContext("cond"))
        theirs = setup.generate()
    finally:
        for registry in registries:
            registry.remove_hook("taylorseer_cache", recurse=False)
        for module in setup.module.modules():
            module.__dict__.pop("_diffusers_hook", None)
            module.__dict__.pop("forward", None)
    assert len(registries) == 9
    assert close(ours, theirs) and not torch.equal(ours, setup.generate())


@pytest.mark.parametrize("level", ["parts", "residual"])
def test_a_forecast_is_nearer_than_a_repetition(level: Any) -> None:
    """On a network that moves slowly in time; and the error falls with the square of the step."""
    setups = [Setup("pixart", steps=n, clock=0.003) for n in (16, 32)]

    def error(setup: Setup, order: int) -> float:
        plain = setup.generate((0, 1))
        plugin = TaylorSeer(2, order, warmup=3, level=level, form="adams")
        return float((setup.cached(plugin, (0, 1))[0] - plain).square().mean().sqrt())

    repeated, forecast = ([error(s, order) for s in setups] for order in (0, 1))
    assert forecast[0] < repeated[0] / 2 and forecast[1] < repeated[1] / 4
    assert 1.6 < repeated[0] / repeated[1] < 2.5 and forecast[0] / forecast[1] > 3


def test_no_error_where_nothing_changes() -> None:
    setup = Setup("pixart", guidance=3.0)
    plain = setup.generate((0, 1), blind=True)
    for plugin in (TaylorSeer(3), TaylorSeer(3, level="residual")):
        out, report = setup.cached(plugin, (0, 1), blind=True)
        assert close(out, plain) and report.did > 0 and report.facts["error_estimate"] < 1e-5


# ---- forecast on a network -----------------------------------------------------------------------


def test_forecast_counts_and_reports() -> None:
    tiny = Tiny.build()
    (it,) = (active("forecast", Forecast(3, warmup=2, last=1), "cache"),)
    wrap = tiny.wrap(Manager([it]), "cache")
    outcome = tiny.generate((0,), wrap)
    assert outcome.counter.depth == 6  # 0, 1, 3, 6, 9 and 10 of 11 steps
    assert outcome.report is not None and outcome.report.did == 5
    assert outcome.report.facts["bytes_held"] == 2 * 2 * 4 * 8 * 8 * 4  # both branches, two nodes
    assert outcome.report.facts["error_estimate"] > 0


def test_forecast_off_and_tokens() -> None:
    tiny = Tiny.build()
    plain = tiny.generate((0, 1)).x0
    for off in (Forecast(1), Forecast(4, last=11), Forecast(4, warmup=11)):
        outcome = tiny.generate((0, 1), tiny.wrap(Manager([active("it", off, "cache")]), "cache"))
        assert torch.equal(outcome.x0, plain) and outcome.report is not None and outcome.report.reason
    with pytest.raises(ConfigError, match=r"forecast is for real vectors.*drop --cache forecast"):
        Forecast().cache(noise=Masked())


@pytest.mark.parametrize("quantity", ["epsilon", "v_prediction", "flow_prediction"])
def test_forecast_of_other_quantities_is_finite_from_alpha_zero_on(quantity: Any) -> None:
    tiny = Tiny.build()
    wrap = tiny.wrap(Manager([active("it", Forecast(3, quantity=quantity), "cache")]), "cache")
    outcome = tiny.generate((0,), wrap)
    assert outcome.x0.isfinite().all() and not torch.equal(outcome.x0, tiny.generate((0,)).x0)


def test_heun_keeps_its_evaluations_apart() -> None:
    """A forecast of each evaluation's own history: Heun with order 1 stays of order 2."""
    noise, target, errors = VPLinear(), Gaussian(), []
    for count in STEPS[:3]:
        times = log_snr_times(noise, count)
        store = Forecast(2, 1, warmup=4).cache(noise=noise)
        assert store.denoiser
        denoiser, x = store.denoiser(Exact(target.denoiser(noise))), torch.tensor([[-1.3], [1.9]]).double()
        start = x
        solver, state = Heun().solver(noise, a_run()), None
        rng, run = SampleRng((0, 1)), a_run(steps=count)
        problem = Problem(x, times, denoiser, {}, solver, noise, rng, run)
        for step, (t, s) in enumerate(itertools.pairwise(times)):
            x, state = solver.step(bind(problem, step, s), x, t, s, state, rng)
            if step < 4:
                x = target.flow_map(noise, start, times[0], s)
        errors.append(float((x - target.flow_map(noise, start, times[0], times[-1])).abs().max()))
    assert slope(STEPS[:3], errors) == pytest.approx(2, abs=0.2)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TaylorSeer, Forecast])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": "0"}, "interval = 0: expected at least 1"),
        ({"order": "5"}, "order = 5: expected 0 to 4"),
        ({"order": "-1"}, "order = -1"),
        ({"warmup": "-1"}, "warmup = -1: expected 0 or more"),
        ({"last": "-2"}, "last = -2"),
        ({"scale": "0"}, "scale = 0.0: expected more than 0"),
        ({"scale": "1.5"}, "scale = 1.5"),
        ({"form": "euler"}, "expected one of taylor, adams, hermite"),
    ],
)
def test_bad_options(cls: type[Plugin], options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


def test_bad_networks_and_kinds() -> None:
    with pytest.raises(ConfigError, match="kinds = 'conv': expected some of"):
        TaylorSeer(kinds=("conv",))
    empty = _tiny.Network(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"taylorseer looked for attention.*--cache taylorseer"):
        TaylorSeer().cache(empty, a_run())
    with pytest.raises(ConfigError, match=r"taylorseer looked for one chain.*nested in the stages of a U-Net"):
        TaylorSeer(level="residual").cache(Setup("unet").network, a_run())
