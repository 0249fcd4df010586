"""First-party schedules: their formulas, and equality with EDM's and diffusers' grids."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Flow, Masked, NoiseSchedule, TrigFlow, VPLinear, VPTable
from suite.diffusion.schedule import Schedule, check_timesteps
from suite.errors import ConfigError
from suite.host.discovery import installed
from suite.host.manager import Manager, load
from suite.plugins.schedules.karras import Karras, KarrasTimes
from suite.plugins.schedules.log_snr import LogSNR, LogSNRTimes
from suite.plugins.schedules.uniform import Uniform, UniformTimes
from suite.recipe import from_options
from suite.testing.oracles import a_run

NOISES = [VPLinear(), Flow(), VE(), TrigFlow(), VPTable.named("scaled_linear")]


def ratio(noise: NoiseSchedule, times: Tensor) -> Tensor:
    return noise.sigma(times) / noise.alpha(times)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_uniform_is_linspace(steps: int) -> None:
    got = UniformTimes().timesteps(Flow(), steps)
    assert torch.equal(got, torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def test_shift_composes() -> None:
    # f_a(f_b(u)) = f_ab(u): shifting twice is one shift by the product.
    times = UniformTimes(6.0).timesteps(Flow(), 20)
    inner = UniformTimes(2.0).timesteps(Flow(), 20)
    torch.testing.assert_close(3 * inner / (1 + 2 * inner), times, rtol=0, atol=1e-15)
    back = times / 6 / (1 + (1 / 6 - 1) * times)
    torch.testing.assert_close(back, UniformTimes().timesteps(Flow(), 20), rtol=0, atol=1e-15)


def test_shift_adds_to_the_log_snr() -> None:
    # In flow coordinates a shift by s moves log-SNR by -2 log s.
    plain, shifted = (UniformTimes(s).timesteps(Flow(), 20)[1:-1] for s in (1.0, 3.0))
    moved = Flow().log_snr(shifted) - Flow().log_snr(plain)
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * np.log(3.0)), rtol=0, atol=1e-12)


def test_shift_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    # Theirs shifts its table and then the grid between the table's ends; its own sigmas are not 1 - i/n.
    theirs.set_timesteps(sigmas=np.linspace(1, 0, 21)[:-1].tolist())
    ours = UniformTimes(3.0).timesteps(Flow(), 20)
    torch.testing.assert_close(ours.float(), theirs.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_log_snr_is_equally_spaced(noise: NoiseSchedule) -> None:
    times = LogSNRTimes(0.98, 0.02).timesteps(noise, 20)
    lam = noise.log_snr(torch.cat([torch.tensor([0.98], dtype=torch.float64), times[1:-1]]))
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(19), rtol=0, atol=1e-8)
    assert float(times[-2]) == pytest.approx(0.02, abs=1e-9)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_karras_is_its_formula(noise: NoiseSchedule) -> None:
    steps, rho = 18, 7.0
    times = KarrasTimes(rho, 0.98, 0.01).timesteps(noise, steps)
    most, least = ratio(noise, torch.tensor([0.98, 0.01], dtype=torch.float64))
    i = torch.arange(steps, dtype=torch.float64)
    expected = (most ** (1 / rho) + i / (steps - 1) * (least ** (1 / rho) - most ** (1 / rho))) ** rho
    torch.testing.assert_close(ratio(noise, times[1:-1]), expected[1:], rtol=1e-8, atol=0)


def test_karras_has_the_values_of_edm() -> None:
    # EDM's CIFAR-10 grid: 18 steps from sigma 80 to 0.002 with rho 7, evaluated from eq. 5.
    noise = VE(sigma_max=80.0)
    low = float(noise.time_at(-2 * torch.tensor(0.002, dtype=torch.float64).log()))
    times = KarrasTimes(7.0, 1 - 1e-12, low).timesteps(noise, 18)
    sigma = noise.sigma(times)
    printed = [80.0, 57.586, 40.786, 28.375, 19.352, 12.910, 8.4009, 5.3151]
    np.testing.assert_allclose(sigma[:8], printed, rtol=1e-4)
    assert float(sigma[-2]) == pytest.approx(0.002) and float(sigma[-1]) == 0


def test_karras_at_rho_7_is_uniform_in_the_time_of_ve() -> None:
    # VE's time is sigma^(1/7): the grid is a straight line in it.
    times = KarrasTimes(7.0, 0.98, 0.02).timesteps(VE(power=7.0), 20)[1:-1]
    torch.testing.assert_close(times.diff(), torch.full((18,), -0.96 / 19, dtype=torch.float64), rtol=0, atol=1e-12)


def test_karras_is_that_of_diffusers() -> None:
    from diffusers import EulerDiscreteScheduler

    theirs: Any = EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    noise, steps = VPTable(tuple(theirs.betas.double().tolist())), 20
    high, low = 0.98, 0.01
    ends = ratio(noise, torch.tensor([high, low], dtype=torch.float64))
    expected = torch.from_numpy(theirs._convert_to_karras(ends.clone(), steps).copy())
    times = KarrasTimes(7.0, high, low).timesteps(noise, steps)
    torch.testing.assert_close(ratio(noise, times[1:-1]), expected[1:].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"high": 1.0}, {"low": 0.0}, {"low": 0.9, "high": 0.5}])
def test_karras_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"karras: .*expected"):
        Karras(**options)


@pytest.mark.parametrize("options", [{"high": 1.0}, {"low": 0.0}, {"low": 0.9, "high": 0.5}])
def test_log_snr_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"log-snr: .*expected"):
        LogSNR(**options)


@pytest.mark.parametrize("shift", [0.0, -1.0, 101.0])
def test_uniform_options(shift: float) -> None:
    with pytest.raises(ConfigError, match="uniform: shift"):
        Uniform(shift)


@pytest.mark.parametrize("plugin", [Karras(), LogSNR()])
def test_tokens_have_no_sigma(plugin: Karras | LogSNR) -> None:
    with pytest.raises(ConfigError, match="use --schedule uniform"):
        plugin.schedule(noise=Masked(), run=a_run())


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([1.0, 0.0], "gave 2 times for 2 steps; expected 3"),
        ([1.0, 0.5, 0.1], "must run from 1 to 0"),
        ([0.9, 0.5, 0.0], "must run from 1 to 0"),
        ([1.0, 1.0, 0.0], "do not decrease"),
        ([1.0, 1.5, 0.0], "outside"),
        ([1.0, float("nan"), 0.0], "outside"),
        ([0.0, 0.5, 1.0], "do not decrease"),
    ],
)
def test_bad_times_are_refused(times: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_timesteps(torch.tensor(times, dtype=torch.float64), 2)


def test_groups_may_wait_for_each_other() -> None:
    # Frames with times of their own: a column may stand still in a step, but not all of them.
    frames = torch.tensor([[1.0, 1.0], [0.5, 1.0], [0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    check_timesteps(frames, 3)
    with pytest.raises(ConfigError, match="do not decrease"):
        check_timesteps(frames[[0, 1, 1, 3]], 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform:shift=3", UniformTimes(3.0)),
        ("log-snr", LogSNRTimes(0.98, 0.02)),
        ("karras:rho=5", KarrasTimes(5.0, 0.98, 0.01)),
    ],
)
def test_hook_schedule(text: str, expected: Schedule) -> None:
    manager = Manager(load(from_options(schedule=text), installed(), "image"))
    assert manager.schedule(Flow(), a_run(steps=20)) == expected
