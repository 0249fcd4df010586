"""Prediction kinds: all four continuous ones are one x0; tokens that are known are kept."""

import pytest
import torch

from suite.diffusion.noise import VE, Cosine, Flow, Masked, NoiseSchedule, TrigFlow, VPLinear
from suite.diffusion.prediction import Prediction, coefficients, from_x0, to_x0, tokens_to_x0
from suite.errors import ConfigError
from suite.testing import Gaussian, Mixture, PointMass
from suite.testing.oracles import log_snr_times, reference

KINDS = [Prediction.EPSILON, Prediction.SAMPLE, Prediction.V, Prediction.FLOW]
NOISES = [VPLinear(), Flow(), TrigFlow(), Cosine(), VE(sigma_max=10.0)]
X = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_four_kinds_are_one_x0(noise: NoiseSchedule) -> None:
    target = Gaussian()
    for t in noise.time_at(torch.linspace(-2, 2, 9, dtype=torch.float64)):
        x0 = target.denoiser(noise)(X, t)
        for kind in KINDS:
            output = target.output(noise, kind)(X, t)
            got = to_x0(kind, output, X, noise.alpha(t), noise.sigma(t))
            torch.testing.assert_close(got, x0, rtol=0, atol=2e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_from_x0_is_the_inverse(kind: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    alpha, sigma = torch.tensor([[0.8], [0.6]], dtype=torch.float64)
    x0 = to_x0(kind, output, x, alpha, sigma)
    torch.testing.assert_close(from_x0(kind, x0, x, alpha, sigma), output, rtol=0, atol=1e-14)


@pytest.mark.parametrize("noise", [Flow(), TrigFlow(), Cosine()], ids=lambda n: n.family)
@pytest.mark.parametrize("kind", [Prediction.V, Prediction.FLOW])
def test_v_and_flow_hold_at_both_ends(noise: NoiseSchedule, kind: Prediction) -> None:
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in (zero, one):
        alpha, sigma = noise.alpha(t), noise.sigma(t)
        output = alpha * eps - sigma * x0 if kind is Prediction.V else eps - x0
        got = to_x0(kind, output, alpha * x0 + sigma * eps, alpha, sigma)
        torch.testing.assert_close(got, x0, rtol=0, atol=1e-14)


def test_epsilon_knows_nothing_at_pure_noise() -> None:
    a, b = coefficients(Prediction.EPSILON, torch.tensor(0.0), torch.tensor(1.0))
    assert a.isinf() and b.isinf()


def test_x0_has_the_dtype_of_the_state() -> None:
    x, output = torch.randn(4), torch.randn(4).bfloat16()
    for kind in KINDS:
        assert to_x0(kind, output, x, torch.tensor(0.8), torch.tensor(0.6)).dtype is torch.float32


def test_score_is_the_gradient_of_the_density() -> None:
    target, noise, t = Gaussian(), Flow(), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(target.score(noise)(X, t), super(Gaussian, target).score(noise)(X, t))
    mean, variance = target.marginal(noise, t)
    x = X.clone().requires_grad_()
    log_p = (-((x - mean) ** 2) / (2 * variance)).sum()
    (gradient,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(target.score(noise)(X, t), gradient)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_the_reference_integrator_follows_the_exact_flow(noise: NoiseSchedule) -> None:
    t, s = log_snr_times(noise, 1)
    target = Gaussian()
    got = reference(target, noise, X, t, s, steps=400)
    torch.testing.assert_close(got, target.flow_map(noise, X, t, s), rtol=0, atol=1e-9)


def test_a_mixture_of_one_is_a_gaussian() -> None:
    one = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[0.7]], [0.25])))
    for t in torch.linspace(0, 1, 5, dtype=torch.float64):
        torch.testing.assert_close(one.denoiser(Flow())(X, t), Gaussian().denoiser(Flow())(X, t))


def test_a_mixture_is_the_integral_over_x0() -> None:
    target, noise, t = Mixture.two(), VPLinear(), torch.tensor(0.4, dtype=torch.float64)
    x0 = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    spread = (x0 - target.means) ** 2 / target.variances[:, None]
    prior = (target.weights[:, None] / target.variances[:, None].sqrt() * torch.exp(-spread / 2)).sum(0)
    likelihood = torch.exp(-((X - noise.alpha(t) * x0) ** 2) / (2 * noise.sigma(t) ** 2))
    exact = (prior * likelihood * x0).sum(1) / (prior * likelihood).sum(1)
    torch.testing.assert_close(target.denoiser(noise)(X, t)[:, 0], exact, rtol=0, atol=1e-12)


def test_a_point_is_certain() -> None:
    for t in (0.0, 0.5, 1.0):
        x0 = PointMass(0.3).denoiser(Cosine())(X, torch.tensor(t or 0.01, dtype=torch.float64))
        torch.testing.assert_close(x0, torch.full_like(X, 0.3), rtol=0, atol=0)


def test_known_tokens_are_kept_and_the_mask_is_never_predicted() -> None:
    mask, logits = 4, torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, mask, 2], [mask, mask, 3]])
    before = logits.clone()
    p = tokens_to_x0(logits, tokens, mask)
    assert torch.equal(logits, before)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3))
    assert (p[..., mask] == 0).all()
    known = tokens != mask
    assert torch.equal(p[known], torch.nn.functional.one_hot(tokens[known], 5).float())
    torch.testing.assert_close(p[~known][:, :4], logits[~known][:, :4].softmax(-1))


def test_kinds_are_named_as_in_diffusers() -> None:
    assert [Prediction.named(k) for k in ("epsilon", "sample", "v_prediction", "flow_prediction")] == KINDS
    with pytest.raises(ConfigError, match="expected one of epsilon, sample"):
        Prediction.named("v")
    with pytest.raises(ConfigError, match="not continuous"):
        coefficients(Prediction.LOGITS, torch.tensor(0.8), torch.tensor(0.6))


def test_masked_is_discrete() -> None:
    assert Masked().discrete and not Flow().discrete
