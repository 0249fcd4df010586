"""Random numbers: one stream a sample, so a sample does not depend on its neighbours."""

import pytest
import torch

from suite.rng import SampleRng, repeatable


def test_a_row_depends_on_its_seed_only() -> None:
    together, alone = SampleRng((3, 1, 2)), SampleRng((1,))
    for _ in range(3):
        assert torch.equal(together.normal((4, 5))[1], alone.normal((4, 5))[0])
        assert torch.equal(together.uniform((7,))[1], alone.uniform((7,))[0])


def test_equal_seeds_give_equal_rows() -> None:
    rows = SampleRng((5, 5, 6)).normal((8,))
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = SampleRng((0,)).normal((4,))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, SampleRng((0,)).normal((4,)))


def test_draws_differ_and_have_unit_variance() -> None:
    rng = SampleRng(range(4))
    one, two = rng.normal((4096,)), rng.normal((4096,))
    assert not torch.equal(one, two)
    assert abs(float(one.mean())) < 0.03 and abs(float(one.var()) - 1) < 0.05
    u = rng.uniform((4096,))
    assert float(u.min()) >= 0 and float(u.max()) < 1


def test_dtype_does_not_change_the_numbers() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    wide, plain = SampleRng((0, 1)).normal_like(x), SampleRng((0, 1)).normal((3,))
    assert wide.dtype is torch.float64 and torch.equal(wide.float(), plain)
    assert SampleRng((0, 1)).uniform((3,), like=x).dtype is torch.float64


def test_gradients_of_repeated_indices_are_the_same_every_time() -> None:
    values, index = torch.randn(2000, 3), torch.randint(0, 2000, (40_000,))

    def gradient() -> torch.Tensor:
        leaf = values.clone().requires_grad_(True)
        with repeatable(leaf.device):
            (leaf[index] * torch.linspace(0, 1, len(index))[:, None]).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))  # on one there is no race to lose
    try:
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("shape", [(), (1,), (7,), (16,), (33,), (3, 5, 7), (0,)])
def test_rows_are_the_numbers_that_their_generators_draw(shape: tuple[int, ...]) -> None:
    rng, one = SampleRng((3, 4)), SampleRng((3,))
    for draw in range(2):
        got = rng.normal(shape)
        assert torch.equal(one.normal(shape), got[:1])
        for row, seed in zip(got, (3, 4), strict=True):
            generator = torch.Generator().manual_seed(seed)
            alone = [torch.randn(shape, generator=generator) for _ in range(draw + 1)]
            assert torch.equal(row, alone[-1])
