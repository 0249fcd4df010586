"""Time grids: each one's invariant, equality with diffusers' flags, and what tokens get."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from suite.diffusion.noise import VE, Cosine, Flow, Masked, NoiseSchedule, Sqrt, TrigFlow, VPGamma, VPLinear, VPTable
from suite.diffusion.schedule import Schedule, check_timesteps
from suite.errors import ConfigError
from suite.host.discovery import installed
from suite.host.manager import Manager, load
from suite.plugins.schedules._levels import level
from suite.plugins.schedules.beta import Beta, BetaTimes
from suite.plugins.schedules.density import Density, DensityTimes
from suite.plugins.schedules.exponential import Exponential, ExponentialTimes
from suite.plugins.schedules.fastdpm import FastDPM, FastDPMTimes, variances
from suite.plugins.schedules.flow_shift import FlowShift, StretchedTimes
from suite.plugins.schedules.hifa import AnnealedTimes, HiFA
from suite.plugins.schedules.karras import Karras, KarrasTimes
from suite.plugins.schedules.log_snr import LogSNRTimes
from suite.plugins.schedules.quadratic import PowerTimes, Quadratic
from suite.plugins.schedules.uniform import UniformTimes
from suite.plugins.solvers.ddim import DDIMSolver
from suite.recipe import from_options
from suite.testing.oracles import Gaussian, a_run, moments

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import OLD_NUMPY, as_time

NOISES = [VPLinear(), Flow(), VE(), TrigFlow(), Cosine(), VPTable.named("scaled_linear")]
TOKENS = [Masked(), Masked("cosine")]


# ---- each grid's own invariant -----------------------------------------------------------------


def test_quadratic_is_even_in_the_square_root() -> None:
    times = PowerTimes(2.0).timesteps(Flow(), 17)
    torch.testing.assert_close(times.sqrt().diff(), as_time(-1 / 17).expand(17), rtol=0, atol=1e-14)
    assert torch.equal(PowerTimes(1.0).timesteps(Flow(), 17), UniformTimes().timesteps(Flow(), 17))


def test_quadratic_is_the_sub_sequence_of_ddim() -> None:
    # tau_i = floor(c i^2) of the paper's code, for 20 of 1000 steps with the last at the last.
    taus = np.floor(1000 / 400 * np.arange(1, 21) ** 2)
    times = PowerTimes(2.0).timesteps(Flow(), 20).flip(0)[1:]
    np.testing.assert_allclose(times * 1000, taus, atol=1.0)


@pytest.mark.parametrize("of", ["ratio", "sigma"])
@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_exponential_levels_have_one_ratio(noise: NoiseSchedule, of: Any) -> None:
    times = ExponentialTimes(0.9, 0.02, of).timesteps(noise, 12)
    logs = level(noise, torch.cat([as_time(0.9), times[1:-1]]), of).log()
    torch.testing.assert_close(logs.diff(), logs.diff()[:1].expand(11), rtol=0, atol=1e-8)
    assert float(times[-2]) == pytest.approx(0.02, abs=1e-9)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_exponential_in_the_ratio_is_even_in_log_snr(noise: NoiseSchedule) -> None:
    ours = ExponentialTimes(0.98, 0.02, "ratio").timesteps(noise, 20)
    torch.testing.assert_close(ours, LogSNRTimes(0.98, 0.02).timesteps(noise, 20), rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_karras_is_its_formula_in_sigma_too(noise: NoiseSchedule) -> None:
    times = KarrasTimes(7.0, 0.9, 0.02, "sigma").timesteps(noise, 12)
    root = noise.sigma(torch.cat([as_time(0.9), times[1:-1]])) ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(11), rtol=0, atol=1e-9)


def test_beta_times_have_the_distribution_function_of_beta() -> None:
    from scipy.stats import beta

    times = BetaTimes(0.6, 0.7, "t", 0.98, 0.01).timesteps(Flow(), 16)
    np.testing.assert_allclose(beta.cdf(times.numpy(), 0.6, 0.7), np.linspace(1, 0, 17), atol=1e-12)


def test_even_beta_is_uniform_and_symmetric_beta_is_its_own_mirror() -> None:
    flat = BetaTimes(1.0, 1.0, "t", 0.98, 0.01).timesteps(Flow(), 16)
    torch.testing.assert_close(flat, UniformTimes().timesteps(Flow(), 16), rtol=0, atol=1e-14)
    times = BetaTimes(0.6, 0.6, "t", 0.98, 0.01).timesteps(Flow(), 16)
    torch.testing.assert_close(times + times.flip(0), torch.ones(17, dtype=torch.float64), rtol=0, atol=1e-12)


def test_flow_shift_maps_compose_and_1_is_identity() -> None:
    plain = FlowShift(shift=1.0).schedule(noise=Flow(), run=a_run()).timesteps(Flow(), 20)
    assert torch.equal(plain, UniformTimes().timesteps(Flow(), 20))
    first = UniformTimes(2.0).timesteps(Flow(), 20)
    again = 3.0 * first / (1 + 2.0 * first)
    torch.testing.assert_close(again, UniformTimes(6.0).timesteps(Flow(), 20), rtol=0, atol=1e-14)


def test_flow_shift_of_the_square_root_is_that_of_sd3() -> None:
    # Eq. 23: with m / n times the tokens the shift is sqrt(m / n): 1024 px against 512 px doubles it.
    plugin = FlowShift(rule="sqrt", base_tokens=1024)
    assert plugin.shift_for(1024) == 1.0 and plugin.shift_for(4096) == 2.0


def test_flow_shift_takes_the_tokens_of_the_run() -> None:
    times = FlowShift(rule="sqrt", base_tokens=64).schedule(noise=Flow(), run=a_run(tokens=256)).timesteps(Flow(), 8)
    assert torch.equal(times, UniformTimes(2.0).timesteps(Flow(), 8))
    with pytest.raises(ConfigError, match=r"how many tokens.*flow-shift:shift=3"):
        FlowShift().schedule(noise=Flow(), run=a_run())


def test_the_engine_tells_the_tokens() -> None:
    from suite.engine.engine import Engine

    with Engine.from_recipe({"steps": 2}, modality="image", model="emoji-unet-32") as engine:
        run = engine._run(engine.request(("x",)), (0,))
        layout = engine.network.layout
        assert layout and run.tokens == layout.tokens > 0


# ---- FastDPM -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("count", [2, 6, 50])
def test_var_keeps_what_the_long_process_keeps(count: int, spacing: Any) -> None:
    bar = math.log(4e-5)
    etas = variances(count, 1e-4, bar, spacing)
    assert float(torch.log1p(-etas).sum()) == pytest.approx(bar, abs=1e-8)
    assert float(etas[0]) == pytest.approx(1e-4) and (etas.diff() > 0).all() and (etas < 1).all()
    rooted = etas if spacing == "linear" else etas.sqrt()
    torch.testing.assert_close(rooted.diff(), rooted.diff()[:1].expand(count - 1), rtol=1e-9, atol=0)


def test_fastdpm_with_all_steps_is_the_long_process() -> None:
    noise = VPTable.named("linear")
    every = torch.arange(1000, -1, -1, dtype=torch.float64) / 1000
    for method in ("var", "step"):
        schedule = FastDPM(method=method).schedule(noise=noise, run=a_run())
        long = VPGamma(1000, noise.betas[0], noise.betas[-1])
        assert schedule.noise == long
        torch.testing.assert_close(schedule.timesteps(long, 1000), every, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 0.0])
def test_kappa_is_eta_and_all_steps_recover_ddpm_and_ddim(kappa: float) -> None:
    # kappa = 1 with S = T is DDPM's chain on the table's betas, kappa = 0 is DDIM's; exact mean and variance.
    noise, target = VPTable.named("linear"), Gaussian()
    schedule = FastDPM().schedule(noise=noise, run=a_run())
    long = schedule.noise
    assert long is not None
    times = schedule.timesteps(long, 1000)[300:]
    start = target.marginal(noise, times[0])
    got = moments(DDIMSolver(long, kappa), times, target.denoiser(long), *start)
    betas = as_time(*noise.betas)
    bar = torch.cumprod(1 - betas, 0)
    (mean, variance), x0 = start, Gaussian()
    for k in range(699, -1, -1):  # table entries that remain
        previous = bar[k - 1] if k else as_time(1.0)[0]
        gain = bar[k].sqrt() * x0.variance / (bar[k] * x0.variance + 1 - bar[k])
        base = x0.mean * (1 - gain * bar[k].sqrt())  # E[x0 given x] = gain x + base
        fresh = kappa * betas[k] * (1 - previous) / (1 - bar[k])
        of_eps = (1 - previous - fresh).clamp(min=0).sqrt() / (1 - bar[k]).sqrt()
        of_x0 = previous.sqrt() - of_eps * bar[k].sqrt()
        slope = of_eps + of_x0 * gain
        mean, variance = slope * mean + of_x0 * base, slope**2 * variance + fresh
    torch.testing.assert_close(got[0], mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got[1], variance, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("noise", [VPTable.named("linear"), VPTable.named("cosine"), *NOISES, Sqrt()], ids=str)
def test_the_bijection_returns_the_level(noise: NoiseSchedule) -> None:
    schedule = FastDPM().schedule(noise=noise, run=a_run())
    assert isinstance(schedule, FastDPMTimes)
    here = schedule.noise or noise
    times = schedule.timesteps(here, 10)
    check_timesteps(times, 10)
    bar = (here.log_snr(times[1:-1]) / 2).exp().square()
    bar = (bar / (1 + bar)).flip(0)
    clean = (here.log_snr(0.0)).sigmoid()[None]
    etas = 1 - bar / torch.cat([clean, bar[:-1]])
    torch.testing.assert_close(etas.diff(), etas.diff()[:1].expand(8), rtol=0, atol=1e-8)


def test_step_is_the_linspace_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(20)
    noise = VPTable.named("linear")
    schedule = FastDPM(method="step").schedule(noise=noise, run=a_run())
    told = VPGamma().time_input(schedule.timesteps(noise, 20)[:-1])
    # Theirs are rounded to entries of the table; FastDPM's point is that they need not be.
    assert torch.equal(told.round().long(), theirs.timesteps)


def test_a_table_that_is_no_line_keeps_its_own_noise() -> None:
    for name in ("scaled_linear", "cosine"):
        assert FastDPM().schedule(noise=VPTable.named(name), run=a_run()).noise is None


# ---- equality with diffusers -------------------------------------------------------------------

STEPS = 20
FLAGS = {"exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas", "karras": "use_karras_sigmas"}


@OLD_NUMPY
@pytest.mark.parametrize("flag", FLAGS)
def test_vp_sigmas_are_those_of_diffusers(flag: str) -> None:
    from diffusers import EulerDiscreteScheduler

    config: dict[str, Any] = {"beta_schedule": "scaled_linear", FLAGS[flag]: True}
    theirs: Any = EulerDiscreteScheduler(**config)
    theirs.set_timesteps(STEPS)
    noise = VPTable(tuple(theirs.betas.double().tolist()))
    sigmas = theirs.sigmas.double()
    # Their ends are what the trained table holds at the first and the last step they take.
    high = float(noise.time_at(-2 * sigmas[0].log())) - 1e-9
    low = float(noise.time_at(-2 * sigmas[-2].log()))
    ours = {
        "exponential": ExponentialTimes(high, low, "ratio"),
        "beta": BetaTimes(0.6, 0.6, "ratio", high, low),
        "karras": KarrasTimes(7.0, high, low, "ratio"),
    }[flag].timesteps(noise, STEPS)
    torch.testing.assert_close(level(noise, ours[1:-1], "ratio"), sigmas[1:-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("flag", FLAGS)
def test_flow_sigmas_are_those_of_diffusers(flag: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config: dict[str, Any] = {FLAGS[flag]: True}
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(STEPS)
    high, low = 1 - 1e-12, 1e-3
    ours = {
        "exponential": ExponentialTimes(high, low, "sigma"),
        "beta": BetaTimes(0.6, 0.6, "sigma", high, low),
        "karras": KarrasTimes(7.0, high, low, "sigma"),
    }[flag].timesteps(Flow(), STEPS)
    torch.testing.assert_close(ours.float(), theirs.sigmas, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rule", "mu"), [("exponential", 0.8), ("linear", 1.7)])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shift_is_that_of_diffusers(rule: Any, mu: float, terminal: float | None) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        time_shift_type=rule,
        shift_terminal=terminal,  # pyright: ignore[reportArgumentType]
    )
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(), mu=mu)
    shift = math.exp(mu) if rule == "exponential" else mu
    ours = StretchedTimes(shift, terminal) if terminal else UniformTimes(shift)
    torch.testing.assert_close(ours.timesteps(Flow(), STEPS).float(), theirs.sigmas, rtol=0, atol=1e-5)


def test_the_shift_of_a_size_is_that_of_diffusers_pipelines() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (256, 1024, 4096):
        assert FlowShift(rule="linear").shift_for(tokens) == pytest.approx(calculate_shift(tokens), abs=1e-12)
        assert FlowShift().shift_for(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), abs=1e-12)


# ---- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", TOKENS, ids=lambda n: n.shape)
@pytest.mark.parametrize(
    "plugin",
    [Quadratic(), Density(), Beta(), Beta(of="sigma"), FlowShift(shift=2.0), Exponential(), Karras(of="sigma")],
    ids=str,
)
def test_grids_in_t_and_in_the_masked_part_serve_tokens(plugin: Any, noise: NoiseSchedule) -> None:
    times = plugin.schedule(noise=noise, run=a_run()).timesteps(noise, 9)
    check_timesteps(times, 9)
    kept = noise.alpha(times)
    assert (kept.diff() > 0).all() and float(kept[0]) == pytest.approx(0) and float(kept[-1]) == pytest.approx(1)


def test_the_exponential_grid_leaves_the_same_part_of_the_masks_in_every_step() -> None:
    noise = Masked("cosine")
    times = Exponential(high=0.98, low=0.02).schedule(noise=noise, run=a_run()).timesteps(noise, 9)[1:-1]
    left = noise.sigma(times[1:]) / noise.sigma(times[:-1])
    torch.testing.assert_close(left, left[:1].expand(7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("plugin", [Exponential(of="ratio"), Karras(), Beta(of="ratio")], ids=str)
def test_the_ratio_is_refused_for_tokens_with_words(plugin: Any) -> None:
    with pytest.raises(ConfigError, match=r"token model has not: use --schedule uniform, or \w+:of=sigma"):
        plugin.schedule(noise=Masked(), run=a_run())


def test_fastdpm_is_refused_for_tokens() -> None:
    with pytest.raises(ConfigError, match="use uniform"):
        FastDPM().schedule(noise=Masked(), run=a_run())


# ---- options and the hook ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Quadratic, {"power": 0.0}),
        (Exponential, {"high": 1.0}),
        (Exponential, {"low": 0.99}),
        (Beta, {"alpha": 0.0}),
        (Beta, {"beta": 50.0}),
        (FlowShift, {"shift": 0.0}),
        (FlowShift, {"base_tokens": 4096}),
        (FlowShift, {"max_shift": 0.1}),
        (FlowShift, {"terminal": 1.0}),
        (FastDPM, {"first": 0.5}),
        (FastDPM, {"high": 1.0}),
        (FastDPM, {"trained": 2}),
        (Density, {"std": 0.0}),
        (Density, {"kind": "mode", "scale": 2.0}),
        (Density, {"kind": "u-shaped", "scale": 0.0}),
        (HiFA, {"power": 0.0}),
        (HiFA, {"low": 0.99}),
    ],
)
def test_bad_options_are_refused(cls: type, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^[a-z-]+: .*expected"):
        cls(**options)


def test_too_many_short_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="take fewer steps"):
        variances(100, 0.01, math.log(0.9), "linear")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quadratic:power=3", PowerTimes(3.0)),
        ("exponential:of=ratio", ExponentialTimes(0.98, 0.02, "ratio")),
        ("beta:alpha=0.5", BetaTimes(0.5, 0.6, "t", 0.98, 0.01)),
        ("flow-shift:shift=3", UniformTimes(3.0)),
        ("flow-shift:shift=3,terminal=0.1", StretchedTimes(3.0, 0.1)),
        ("fastdpm:method=step,spacing=quadratic", FastDPMTimes("step", "quadratic", 1e-4, 0.99, 1000)),
        ("density:kind=mode", DensityTimes("mode", 0.0, 1.0, 1.29)),
        ("hifa:power=1", AnnealedTimes(0.98, 0.02, 1.0)),
        ("karras:of=sigma", KarrasTimes(7.0, 0.98, 0.01, "sigma")),
    ],
)
def test_the_hook_makes_them(text: str, expected: Schedule) -> None:
    manager = Manager(load(from_options(schedule=text), installed(), "image"))
    assert manager.schedule(Flow(), a_run(steps=20)) == expected


# ---- densities and annealing -------------------------------------------------------------------

EVEN = torch.linspace(0, 1, 2001, dtype=torch.float64)


def cdf(kind: str, t: np.ndarray) -> np.ndarray:
    from scipy.stats import norm

    if kind == "logit-normal":
        return norm.cdf((np.log(t / (1 - t)) - 0.3) / 0.8)
    if kind == "u-shaped":  # the integral of (e^4t + e^(4 - 4t)), normalised
        return (np.expm1(4 * t) + np.exp(4) - np.exp(4 - 4 * t)) / (2 * np.expm1(4))
    return t


@pytest.mark.parametrize("kind", ["logit-normal", "u-shaped", "uniform"])
def test_quantiles_invert_the_distribution_function(kind: Any) -> None:
    schedule: Any = Density(kind, mean=0.3, std=0.8).schedule(noise=Flow(), run=a_run())
    u = EVEN[1:-1]
    np.testing.assert_allclose(cdf(kind, schedule.quantile(u).numpy()), u, atol=1e-12)


@pytest.mark.parametrize("kind", ["logit-normal", "mode", "u-shaped", "uniform"])
def test_training_times_have_their_density(kind: Any) -> None:
    # The largest gap between the empirical and the true distribution function; 1.63 is its 1 % point.
    schedule: Any = Density(kind, mean=0.3, std=0.8).schedule(noise=Flow(), run=a_run())
    drawn = schedule.training_times(20_000, torch.Generator().manual_seed(0)).sort().values
    assert ((drawn >= 0) & (drawn <= 1)).all()
    truth = np.interp(drawn, schedule.quantile(EVEN).numpy(), EVEN.numpy())
    gap = np.abs(truth - np.linspace(0, 1, 20_000)).max()
    assert gap < 1.63 / math.sqrt(20_000)


@pytest.mark.parametrize(("kind", "scheme"), [("logit-normal", "logit_normal"), ("mode", "mode")])
def test_densities_are_those_of_diffusers(kind: Any, scheme: str) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling(
        scheme, 50_000, logit_mean=0.3, logit_std=0.8, mode_scale=1.29, generator=torch.Generator().manual_seed(1)
    )
    ours: Any = Density(kind, mean=0.3, std=0.8).schedule(noise=Flow(), run=a_run())
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    expected = ours.quantile(quantiles)
    slope = (ours.quantile(quantiles + 1e-4) - ours.quantile(quantiles - 1e-4)) / 2e-4
    error = slope * (quantiles * (1 - quantiles) / 50_000).sqrt()  # of an empirical quantile
    assert (((theirs.double().quantile(quantiles) - expected) / error).abs() < 4).all()


def mode(scale: float) -> Any:
    return Density("mode", scale=scale).schedule(noise=Flow(), run=a_run())


def test_the_mode_density_is_symmetric_and_rises_over_its_range() -> None:
    for scale in (-1.0, 0.0, 1.29, 1.75):
        t = mode(scale).quantile(EVEN)
        assert (t.diff() > 0).all()
        torch.testing.assert_close(t + t.flip(0), torch.ones_like(t), rtol=0, atol=1e-12)
    assert torch.equal(mode(0.0).quantile(EVEN), EVEN)


def test_distillation_anneals_by_the_square_root() -> None:
    schedule: Any = HiFA().schedule(noise=Flow(), run=a_run())
    progress = [k / 50 for k in range(51)]
    rng = torch.Generator().manual_seed(0)
    times = torch.cat([schedule.distillation_times(Flow(), 1, p, rng) for p in progress])
    assert float(times[0]) == 0.98 and float(times[-1]) == pytest.approx(0.02)
    assert (times.diff() < 0).all()
    torch.testing.assert_close((0.98 - times) ** 2, 0.96**2 * as_time(*progress), rtol=0, atol=1e-12)
    assert schedule.distillation_times(Flow(), 3, 0.25, rng).tolist() == [0.5] * 3
