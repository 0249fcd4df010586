"""Random numbers: one stream a sample, so a sample does not depend on its neighbours."""

import pytest
import torch

from suite.diffusion.rng import SampleRng, generator, repeatable


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
            stream = generator(seed)
            alone = [torch.randn(shape, generator=stream) for _ in range(draw + 1)]
            assert torch.equal(row, alone[-1])


def test_seeds_are_independent() -> None:
    """Over seeds 0 to 999: unit normal, and no two rows correlated beyond chance (5.5 deviations in 500,000 pairs)."""
    x = SampleRng(range(1000)).normal((256,)).double()
    assert abs(float(x.mean())) * 256_000**0.5 < 4 and abs(float(x.var()) - 1) < 0.02
    assert abs(float((x[1:] * x[:-1]).mean())) * (999 * 256) ** 0.5 < 4  # neighbouring seeds
    pairs = (x @ x.T) / 256**0.5
    assert float(pairs.fill_diagonal_(0).abs().max()) < 5.5
    raw = torch.stack([torch.randn(256, generator=torch.Generator().manual_seed(s)) for s in range(1000)]).double()
    assert float((x @ raw.T).abs().max()) / 256**0.5 < 5.5  # no seed is another one's raw stream


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_every_bit_of_a_seed_counts(seed: int) -> None:
    """The raw generator takes the low 32 bits alone."""
    rows = SampleRng([seed, seed + 2**32, seed + 2**62, seed - 1 + 2**63]).normal((8,))
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_streams_of_one_seed_differ() -> None:
    one, other = (torch.rand(8, generator=generator(7, stream)) for stream in ("sample", "field"))
    assert not torch.equal(one, other) and torch.equal(one, SampleRng((7,)).uniform((8,))[0])
