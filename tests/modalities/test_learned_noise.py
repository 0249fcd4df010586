"""A learned noise schedule: monotone, between its ends, and of no consequence for the value of the bound."""

import math

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VPLinear
from suite.modalities.shared.learned_noise import LearnedSNR, bound

FIRST, LAST, C = 6.0, -5.0, 0.25
T = torch.linspace(0, 1, 4001, dtype=torch.float64)


def error(ratio: Tensor) -> Tensor:
    """E |x0 - D|^2 of N(0, C) at this SNR."""
    return C / (C * ratio + 1)


def integral(values: Tensor) -> float:
    """Simpson's rule over T."""
    h = 1 / (len(T) - 1)
    return float(h / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()))


def bent(seed: int = 0) -> LearnedSNR:
    """One with a shape of its own."""
    net, rng = LearnedSNR(FIRST, LAST), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net.height += 4 * torch.randn(net.height.shape, generator=rng, dtype=torch.float64)
    return net


def test_it_falls_between_its_ends() -> None:
    for net in (LearnedSNR(FIRST, LAST), bent(), bent(1)):
        found = net(T).detach()
        assert (found.diff() < 0).all()
        assert float(found[0]) == pytest.approx(FIRST, abs=1e-12) and float(found[-1]) == pytest.approx(LAST, abs=1e-12)
    with pytest.raises(ValueError, match="must fall"):
        LearnedSNR(-1.0, 1.0)


def test_the_bound_depends_on_the_ends_alone() -> None:
    exact = math.log((C * math.exp(FIRST) + 1) / (C * math.exp(LAST) + 1)) / 2  # 1/2 int C / (C s + 1) ds
    vp = VPLinear()
    low, high = (float(vp.time_at(v)) for v in (FIRST, LAST))
    shapes = {
        "linear": lambda t: FIRST + (LAST - FIRST) * t,
        "cubed": lambda t: FIRST + (LAST - FIRST) * t**3,
        "vp": lambda t: vp.log_snr(low + (high - low) * t),
        "learned": bent(),
        "learned too": bent(1),
    }
    for name, shape in shapes.items():
        assert integral(bound(shape, error, T).detach()) == pytest.approx(exact, rel=1e-5), name
    other = integral(bound(lambda t: FIRST - 1 + (LAST - FIRST) * t, error, T).detach())
    assert abs(other - exact) > 0.1


def test_learning_lowers_the_variance_and_leaves_the_bound() -> None:
    net = bent()
    optimizer, grid = torch.optim.Adam(net.parameters(), 0.05), torch.linspace(0, 1, 401, dtype=torch.float64)[1:-1]

    def variance() -> float:
        return float(bound(net, error, grid).detach().var())

    before, value = variance(), integral(bound(net, error, T).detach())
    for _ in range(60):
        optimizer.zero_grad()
        bound(net, error, grid).square().mean().backward()
        optimizer.step()
    assert variance() < before / 10
    assert integral(bound(net, error, T).detach()) == pytest.approx(value, rel=1e-4)


def test_as_a_table_it_serves_checkpoints() -> None:
    net = bent()
    table, t = net.table(200), torch.arange(1, 201, dtype=torch.float64) / 200
    torch.testing.assert_close(table.log_snr(t), net(t).detach(), rtol=0, atol=1e-9)
