"""Noise schedules: coefficients, inverse of log-SNR, and agreement with the papers and with diffusers."""

import math
from typing import Any

import pytest
import torch

from suite.diffusion.noise import (
    FAMILIES,
    VE,
    Cosine,
    Flow,
    Laplace,
    Masked,
    NoiseSchedule,
    ResShift,
    Sigmoid,
    Sqrt,
    SubVP,
    TrigFlow,
    Uniform,
    VPGamma,
    VPLinear,
    VPTable,
    from_config,
)
from suite.errors import ConfigError

TABLES = map(VPTable.named, ("linear", "scaled_linear", "cosine"))
VP = [VPLinear(), Cosine(), Sqrt(), Sigmoid(), Laplace(), VPGamma(), *TABLES]
CONTINUOUS = [*VP, SubVP(), VE(), Flow(), Flow(shift=3.0), TrigFlow(), ResShift()]
DISCRETE = [Masked(), Masked("cosine"), Uniform()]
T = torch.linspace(0, 1, 1001, dtype=torch.float64)
INNER = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def name(noise: NoiseSchedule) -> str:
    return noise.family


def test_every_family_is_tested() -> None:
    assert {n.family for n in (*CONTINUOUS, *DISCRETE)} == set(FAMILIES)


@pytest.mark.parametrize("noise", [*CONTINUOUS, *DISCRETE], ids=name)
def test_coefficients_are_in_range(noise: NoiseSchedule) -> None:
    alpha, sigma = noise.alpha(T), noise.sigma(T)
    assert alpha.dtype is sigma.dtype is torch.float64
    assert alpha.shape == sigma.shape == T.shape
    assert ((alpha >= 0) & (alpha <= 1)).all()
    assert (sigma >= 0).all() and sigma.isfinite().all()
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()


@pytest.mark.parametrize("noise", CONTINUOUS, ids=name)
def test_log_snr_falls(noise: NoiseSchedule) -> None:
    assert (noise.log_snr(INNER).diff() < 0).all()
    expected = 2 * (noise.alpha(INNER) / noise.sigma(INNER)).log()
    torch.testing.assert_close(noise.log_snr(INNER), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", CONTINUOUS, ids=name)
def test_time_at_inverts_log_snr(noise: NoiseSchedule) -> None:
    torch.testing.assert_close(noise.time_at(noise.log_snr(INNER)), INNER, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", CONTINUOUS, ids=name)
def test_time_at_stays_in_the_interval(noise: NoiseSchedule) -> None:
    times = noise.time_at(torch.tensor([-1e4, 1e4], dtype=torch.float64))
    assert ((times >= 0) & (times <= 1)).all()


@pytest.mark.parametrize("noise", VP, ids=name)
def test_variance_is_preserved(noise: NoiseSchedule) -> None:
    torch.testing.assert_close(noise.alpha(T) ** 2 + noise.sigma(T) ** 2, torch.ones_like(T), rtol=0, atol=1e-15)


@pytest.mark.parametrize("noise", [Cosine(), Laplace(), Sigmoid(), Flow(), TrigFlow()], ids=name)
def test_these_end_in_pure_noise(noise: NoiseSchedule) -> None:
    assert float(noise.alpha(1.0)) == 0
    assert float(noise.sigma(1.0)) == 1
    assert float(noise.log_snr(1.0)) == -math.inf


@pytest.mark.parametrize("noise", [n for n in CONTINUOUS if not isinstance(n, Sqrt)], ids=name)
def test_these_end_in_clean_data(noise: NoiseSchedule) -> None:
    assert float(noise.sigma(0.0)) == 0
    assert float(noise.log_snr(0.0)) == math.inf


def test_linear_is_the_integral_of_its_beta() -> None:
    # log alpha(t) = -1/2 int_0^t beta, by Simpson's rule, which is exact for a linear beta.
    noise = VPLinear()
    beta = [noise.beta_min + u * (noise.beta_max - noise.beta_min) for u in (0, 0.2, 0.4)]
    integral = 0.4 / 6 * (beta[0] + 4 * beta[1] + beta[2])
    assert float(noise.log_alpha(0.4)) == pytest.approx(-integral / 2, abs=1e-15)


def test_ddpm_beta_increases() -> None:
    noise = VPTable.named("linear")
    assert all(a < b for a, b in zip(noise.betas[:-1], noise.betas[1:], strict=True))
    assert float(noise.alpha(1.0) ** 2) == pytest.approx(4.0e-5, rel=0.02)


def test_cosine_is_not_the_surveys_equation_7() -> None:
    # The survey prints 1 - cos/cos, without squares, and calls it beta; that is 1 - sqrt(alpha_bar).
    noise = VPTable.named("cosine")
    bar = float(noise.alpha(0.5) ** 2)
    assert noise.betas[499] == pytest.approx(0.0031459, abs=5e-8)
    assert 1 - bar == pytest.approx(0.50616, abs=5e-6)
    printed = 1 - math.sqrt(bar)
    assert printed == pytest.approx(0.29726, abs=5e-6)
    assert abs(noise.betas[499] - printed) > 0.2


def test_cosine_table_is_the_formula_up_to_its_clip() -> None:
    noise, table = Cosine(), VPTable.named("cosine")
    assert [k for k, beta in enumerate(table.betas) if beta == 0.999] == [999]
    t = T[:-1]
    torch.testing.assert_close(table.alpha(t) ** 2, noise.alpha(t) ** 2, rtol=0, atol=1e-12)


def test_laplace_has_its_distribution() -> None:
    noise = Laplace(mu=0.3, b=0.5)
    lam = noise.log_snr(INNER)
    y = (lam - noise.mu) / noise.b
    cdf = torch.where(y < 0, 0.5 * torch.exp(y), 1 - 0.5 * torch.exp(-y))
    # log-SNR falls with t, so P(log-SNR below that of t) = 1 - t.
    torch.testing.assert_close(cdf, 1 - INNER, rtol=0, atol=1e-14)


def test_laplace_alpha_bar_is_the_papers() -> None:
    noise = Laplace()
    bar = noise.alpha(INNER) ** 2
    torch.testing.assert_close(bar + bar.flip(0), torch.ones_like(bar), rtol=0, atol=1e-14)
    assert float(noise.alpha(0.5) ** 2) == pytest.approx(0.5, abs=1e-15)  # diffusers gives its root, 0.7071


def test_sqrt_starts_with_noise() -> None:
    assert float(Sqrt().alpha(0.0) ** 2) == pytest.approx(0.99, abs=1e-15)
    assert float(Sqrt().sigma(0.0)) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_table_is_that_of_diffusers(ours: str, theirs: str) -> None:
    from diffusers import DDPMScheduler

    config: dict[str, Any] = {"beta_schedule": theirs, "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = DDPMScheduler(**config)
    k = torch.arange(1000, dtype=torch.float64)
    noise = VPTable.named(ours)
    betas = torch.tensor(noise.betas, dtype=torch.float64)
    # Theirs is a float32 table: linspace in float32 is off by an ulp of its largest entry or so.
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=2e-5, atol=2e-9)
    torch.testing.assert_close(
        noise.alpha((k + 1) / 1000) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7
    )

    same = VPTable(tuple(scheduler.betas.double().tolist()))
    product = torch.cumprod(1 - scheduler.betas.double(), 0)
    torch.testing.assert_close(same.alpha((k + 1) / 1000) ** 2, product, rtol=1e-12, atol=0)


def test_gammas_at_whole_steps_are_the_table() -> None:
    table, gammas = VPTable.named("linear"), VPGamma()
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(gammas.log_alpha(steps), table.log_alpha(steps), rtol=1e-14, atol=0)
    assert torch.equal(gammas.time_input(steps), table.time_input(steps))


def test_gammas_between_the_steps_are_those_of_the_paper() -> None:
    # log Gamma itself loses ten digits here, which is why the difference is taken from a series.
    noise, step = VPGamma(), (0.02 - 1e-4) / 999
    top = (1 - 1e-4) / step + 1
    for u in (0.25, 3.5, 417.125, 999.75):
        expected = u * math.log(step) + math.lgamma(top) - math.lgamma(top - u)
        assert float(2 * noise.log_alpha(u / 1000)) == pytest.approx(expected, abs=1e-8)
    # The functional equation Gamma(z + 1) = z Gamma(z) is exact: one step multiplies by 1 - beta at real u too.
    ratio = 2 * (noise.log_alpha(0.4175) - noise.log_alpha(0.4165))
    assert float(ratio) == pytest.approx(math.log1p(-(1e-4 + (417.5 - 1) * step)), abs=1e-12)


def test_gammas_need_a_table_with_small_steps() -> None:
    with pytest.raises(ConfigError, match="too few"):
        VPGamma(timesteps=5, beta_end=0.9)
    with pytest.raises(ConfigError, match="beta_start < beta_end"):
        VPGamma(beta_start=0.02)


def test_sub_vp_has_the_variance_of_its_sde() -> None:
    # Score SDE: mean e^(-B/2), variance (1 - e^-B)^2, B the integral of beta; never above that of VP.
    noise, vp = SubVP(), VPLinear()
    kept = vp.alpha(T) ** 2
    torch.testing.assert_close(noise.sigma(T) ** 2, (1 - kept) ** 2, rtol=0, atol=1e-15)
    assert torch.equal(noise.alpha(T), vp.alpha(T)) and (noise.sigma(T) <= vp.sigma(T)).all()
    # Its forward equation d var / dt = -beta var + beta (1 - e^(-2B)), by central differences.
    h, t = 1e-5, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    variance = (noise.sigma(t + h) ** 2 - noise.sigma(t - h) ** 2) / (2 * h)
    beta, b = 0.1 + t * 19.9, -2 * vp.log_alpha(t)
    torch.testing.assert_close(
        variance, -beta * noise.sigma(t) ** 2 + beta * (1 - torch.exp(-2 * b)), rtol=1e-6, atol=0
    )


def test_a_shifted_flow_is_the_flow_at_shifted_times() -> None:
    shifted = 3 * T / (1 + 2 * T)
    torch.testing.assert_close(Flow(shift=3.0).sigma(T), Flow().sigma(shifted), rtol=0, atol=1e-15)
    torch.testing.assert_close(Flow(shift=3.0).time_input(T), Flow().time_input(shifted), rtol=0, atol=1e-12)
    assert torch.equal(Flow(shift=1.0).sigma(T), T) and torch.equal(Flow().time_input(T), 1000 * T)


def test_res_shift_is_its_sequence() -> None:
    noise = ResShift()
    t = torch.arange(1, 16, dtype=torch.float64) / 15
    eta = noise.eta(t)
    base = math.exp(math.log(0.999 / 4e-4) / (2 * 14))
    exponent = (torch.arange(15, dtype=torch.float64) / 14) ** 0.3 * 14
    torch.testing.assert_close(eta.sqrt(), 0.02 * base**exponent, rtol=1e-12, atol=0)
    assert (eta.diff() > 0).all() and float(eta[0]) == pytest.approx(4e-4) and float(eta[-1]) == pytest.approx(0.999)
    torch.testing.assert_close(noise.sigma(t), 2 * eta.sqrt(), rtol=1e-14, atol=0)
    assert torch.equal(noise.time_input(t).round(), torch.arange(15, dtype=torch.float64))


def test_composed_kernels_of_res_shift_are_its_marginal() -> None:
    # q(x_k given x_(k-1), x0) = N(x_(k-1) + a_k e0, kappa^2 a_k), a_k = eta_k - eta_(k-1): it shifts and adds noise.
    noise, x0, y = ResShift(), 0.3, -1.1
    eta = noise.eta(torch.arange(1, 16, dtype=torch.float64) / 15)
    mean, variance, before = x0, 0.0, 0.0
    for k, now in enumerate(eta.tolist()):
        mean, variance = mean + (now - before) * (y - x0), variance + noise.kappa**2 * (now - before)
        before, t = now, (k + 1) / 15
        assert mean == pytest.approx(float(noise.alpha(t)) * (x0 - y) + y, abs=1e-12)
        assert variance == pytest.approx(float(noise.sigma(t)) ** 2, abs=1e-12)


def test_the_posterior_of_res_shift_is_a_member_of_ddims_family() -> None:
    # Bayes: mean (eta_s / eta_t) x_t + (a / eta_t) x0, variance kappa^2 eta_s a / eta_t with a = eta_t - eta_s. It is
    # alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z with tau^2 = sigma_s^2 (1 - sigma_s^2 / sigma_t^2).
    noise, (s, t) = ResShift(), torch.tensor([7 / 15, 8 / 15], dtype=torch.float64)
    eta_s, eta_t, sigma_s, sigma_t = noise.eta(s), noise.eta(t), noise.sigma(s), noise.sigma(t)
    tau = sigma_s**2 * (1 - (sigma_s / sigma_t) ** 2)
    torch.testing.assert_close(tau, noise.kappa**2 * eta_s * (eta_t - eta_s) / eta_t, rtol=1e-12, atol=0)
    of_x = (sigma_s**2 - tau).sqrt() / sigma_t
    torch.testing.assert_close(of_x, eta_s / eta_t, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise.alpha(s) - of_x * noise.alpha(t), (eta_t - eta_s) / eta_t, rtol=1e-12, atol=0)
    precision = 1 / (noise.kappa**2 * eta_s) + 1 / (noise.kappa**2 * (eta_t - eta_s))  # prior times likelihood
    torch.testing.assert_close(1 / precision, tau, rtol=1e-12, atol=0)


def test_table_is_told_its_index() -> None:
    noise = VPTable.named("linear")
    k = torch.tensor([0.0, 1.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(noise.time_input((k + 1) / 1000), k, rtol=0, atol=1e-12)
    assert float(noise.time_input(torch.tensor(0.0))) == 0


def test_what_the_network_is_told() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Flow().time_input(t), 1000 * t)
    torch.testing.assert_close(TrigFlow().time_input(t), t * math.pi / 2)
    told = VE().time_input(t)
    assert told.isfinite().all()
    assert float(told[2]) == pytest.approx(math.log(80) / 4)


def test_tokens_are_kept_or_not() -> None:
    for noise in DISCRETE:
        torch.testing.assert_close(noise.alpha(T) + noise.sigma(T), torch.ones_like(T))
        assert float(noise.alpha(0.0)) == pytest.approx(1) and float(noise.alpha(1.0)) == pytest.approx(0)
    # MDLM's probability of unmasking in a step from t to s.
    t, s = 0.6, 0.4
    keep = Masked().alpha
    assert float((keep(s) - keep(t)) / (1 - keep(t))) == pytest.approx((t - s) / t)


def test_from_config() -> None:
    assert from_config({"family": "flow"}) == Flow()
    assert from_config({"family": "vp-linear", "beta_max": 10.0}) == VPLinear(beta_max=10.0)
    assert from_config({"family": "vp-table", "table": "scaled_linear"}) == VPTable.named("scaled_linear")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "unknown noise family None"),
        ({"family": "vp"}, "expected one of"),
        ({"family": "flow", "drift": 3}, "unknown option 'drift'"),
        ({"family": "flow", "shift": 0}, "shift = 0"),
        ({"family": "resshift", "eta_first": 1.0}, "eta_first < eta_last"),
        ({"family": "vp-table", "table": "log"}, "unknown beta table 'log'"),
        ({"family": "masked", "shape": "steep"}, "expected linear or cosine"),
    ],
)
def test_from_config_says_what_is_wrong(config: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_config(config)
