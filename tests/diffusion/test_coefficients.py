"""Coefficients are remembered at scalar times, computed at others, and the same in both."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from suite.diffusion.coefficients import combine, of_times
from suite.diffusion.noise import Cosine, Flow, VPLinear, VPTable
from suite.diffusion.prediction import Prediction, x0_weights
from suite.diffusion.solver import transfer, transfer_weights

TABLE = VPTable.named("linear", 50)


@pytest.mark.parametrize("noise", [Flow(), Cosine(), VPLinear(), TABLE])
def test_scalars_and_tensors_agree(noise):
    t, s = torch.tensor([1.0, 0.6], dtype=torch.float64), torch.tensor([0.7, 0.0], dtype=torch.float64)
    together = transfer_weights(noise, t, s)
    for row in range(2):
        alone = transfer_weights(noise, t[row], s[row])
        assert all(type(c) is float for c in alone)
        assert [float(c[row]) for c in together] == pytest.approx(alone, rel=1e-15)


def test_scalar_times_are_computed_once():
    asked = []

    @of_times
    def count(noise, t, weight):
        asked.append(float(weight))
        return (t * weight,)

    t = torch.tensor(0.5, dtype=torch.float64)
    assert [count(Flow(), t, 3.0) for _ in range(3)] == [(1.5,)] * 3
    assert count(Flow(), t, 2.0) == (1.0,)
    assert count(Cosine(), t, 2.0) == (1.0,)  # another schedule is another question
    assert asked == [3.0, 2.0, 2.0]
    for _ in range(2):
        count(Flow(), t.expand(2), 3.0)
    assert asked == [3.0, 2.0, 2.0, 3.0, 3.0]


def test_equal_schedules_share_and_different_ones_do_not():
    assert hash(TABLE) == hash(VPTable.named("linear", 50)) and VPTable.named("linear", 50) == TABLE
    assert VPTable.named("cosine", 50) != TABLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combine_is_the_linear_combination(dtype):
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 4, generator=rng, dtype=torch.float64).to(dtype) for _ in range(3)]
    values = (0.25, -1.5, 0.0)
    expected = sum(c * x for c, x in zip(values, parts, strict=True))
    out = combine(values, parts)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    rows = tuple(torch.tensor([c, 2 * c], dtype=torch.float64) for c in values)
    out = combine(rows, parts)
    assert out.dtype == dtype
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1], 2 * expected[1])
    groups = tuple(torch.full((2, 3), c, dtype=torch.float64) for c in values)
    torch.testing.assert_close(combine(groups, parts), expected)


def test_combine_keeps_its_inputs():
    x = torch.ones(2, 2)
    combine((2.0, 3.0), (x, x))
    assert torch.equal(x, torch.ones(2, 2))


class _Large(TorchDispatchMode):
    """Counts operations on tensors of x's size."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.size, self.count = x.numel(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, torch.Tensor) and out.numel() == self.size
        return out


@pytest.mark.parametrize(
    ("values", "operations"),
    [((0.3, 0.7), 1), ((1.0, -0.4), 1), ((0.3, 0.6), 2), ((1.0, 0.2, -0.4), 2), ((0.2, 0.3, 0.5), 3), ((1.2, -0.2), 1)],
)
def test_combine_takes_no_more_operations_than_it_must(values, operations):
    parts = [torch.randn(4, 1000, dtype=torch.float64) for _ in values]
    with _Large(parts[0]) as counted:
        out = combine(values, parts)
    expected = sum(value * part for value, part in zip(values, parts, strict=True))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    assert counted.count == operations


def test_euler_of_a_flow_is_two_operations():
    # One for x0 out of the velocity, and one for the step.
    noise, (t, s) = Flow(), torch.tensor([0.7, 0.6], dtype=torch.float64)
    x, velocity = torch.randn(2, 4, 1000)
    with _Large(x) as counted:
        x0 = combine(x0_weights(Prediction.FLOW)(noise, t), (x, velocity))
        got = transfer(noise, x, x0, t, s)
    torch.testing.assert_close(got, x + (s - t).float() * velocity)
    assert counted.count == 2
