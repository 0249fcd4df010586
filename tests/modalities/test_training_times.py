"""Training files may name a schedule, whose density the times are then drawn from."""

import pytest
import torch

from suite.errors import ConfigError
from suite.modalities.shared.flow import drawn_times, flow_loss
from suite.plugins.schedules.density import DensityTimes


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def test_without_a_schedule_times_are_logit_normal_as_before() -> None:
    expected = torch.sigmoid(0.6 + 0.8 * torch.randn(32, generator=rng()))
    assert torch.equal(drawn_times("", 0.6, 0.8)(32, rng()), expected)


@pytest.mark.parametrize("text", ["density:kind=u-shaped", "density:kind=mode,scale=0.5", "uniform"])
def test_a_named_schedule_draws_them(text: str) -> None:
    t = drawn_times(text, 0.6, 0.8)(512, rng())
    assert t.dtype is torch.float32 and t.shape == (512,) and ((t > 0) & (t <= 1)).all()
    if "u-shaped" in text:
        assert torch.equal(t, DensityTimes("u-shaped", 0.0, 1.0, 4.0).training_times(512, rng()).float())


def test_the_loss_sees_them() -> None:
    seen = []

    def draw(generator: torch.Generator):
        return torch.zeros(8, 2, 1, 1), None

    def predict(network, x, t, text):
        seen.append(t)
        return torch.zeros_like(x)

    loss = flow_loss(draw, 0.0, 1.0, 0.1, predict=predict, schedule="density:kind=u-shaped")
    assert float(loss(torch.nn.Identity(), rng())) == 0
    assert torch.equal(seen[0], DensityTimes("u-shaped", 0.0, 1.0, 4.0).training_times(8, rng()).float())


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown plugin"):
        drawn_times("densty", 0.0, 1.0)
    with pytest.raises(ConfigError, match="does not implement the hook 'schedule'"):
        drawn_times("ddim", 0.0, 1.0)
    with pytest.raises(ConfigError, match="expected one of"):
        drawn_times("density:kind=bell", 0.0, 1.0)
