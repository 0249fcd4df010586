"""The tube code: lossless, orthogonal, its first part the mean picture."""

import pytest
import torch

from suite.errors import ConfigError
from suite.modalities.video.tubes import apart, from_tubes, to_tubes, together


@pytest.mark.parametrize(("length", "gain"), [(1, 1.0), (4, 1.0), (6, 3.0)])
def test_round_trip_is_exact(length: int, gain: float):
    clip = torch.randn(2, 4, 24, 8, 8, dtype=torch.float64)
    code = to_tubes(clip, length, gain)
    assert code.shape == (2, 4 * length, 24 // length, 8, 8)
    assert (from_tubes(code, length, gain) - clip).abs().max() < 1e-12


def test_first_channels_are_the_mean_picture_and_a_still_has_no_others():
    clip = torch.rand(1, 4, 12, 4, 4, dtype=torch.float64)
    code = to_tubes(clip, 6, 3.0)
    torch.testing.assert_close(code[:, :4], clip.unflatten(2, (2, 6)).mean(3))
    still = to_tubes(clip[:, :, :1].expand(-1, -1, 12, -1, -1), 6, 3.0)
    assert still[:, 4:].abs().max() < 1e-12


def test_without_gain_it_is_a_scaled_rotation():
    clip = torch.randn(1, 4, 6, 4, 4, dtype=torch.float64)
    assert float(to_tubes(clip, 6, 1.0).square().sum() * 6) == pytest.approx(float(clip.square().sum()))


def test_sizes_that_do_not_fit_are_errors():
    with pytest.raises(ConfigError, match="does not fill tubes of 6"):
        to_tubes(torch.zeros(1, 4, 16, 2, 2), 6, 1.0)
    with pytest.raises(ConfigError, match="does not hold 6 coefficients"):
        from_tubes(torch.zeros(1, 4, 2, 2, 2), 6, 1.0)


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_shared_noise_has_unit_variance_and_that_correlation(shared: float):
    z = torch.randn(1, 1, 4, 300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = together(z, shared)
    cov = torch.cov(x[0, 0].flatten(1))
    want = torch.full((4, 4), shared, dtype=torch.float64).fill_diagonal_(1.0)
    assert (cov - want).abs().max() < 0.02
    assert (apart(x, shared) - z).abs().max() < 1e-12
