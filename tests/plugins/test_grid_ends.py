"""Where grids end by default: at levels that the noise family calls sensible, not at times that are so elsewhere."""

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import VE, Cosine, Flow, Laplace, NoiseSchedule, TrigFlow, VPLinear, VPTable
from suite.errors import ConfigError
from suite.fitting.stamp import RunStamp
from suite.host.discovery import installed
from suite.host.manager import implemented_hooks
from suite.plugin import Plugin
from suite.plugins.schedules.beta import Beta
from suite.plugins.schedules.exponential import Exponential
from suite.plugins.schedules.flow_shift import FlowShift
from suite.plugins.schedules.karras import Karras
from suite.plugins.schedules.log_snr import LogSNR
from suite.plugins.schedules.quadratic import Quadratic
from suite.plugins.schedules.uniform import Uniform
from suite.plugins.solvers.dpmpp_3m import DPMpp3M
from suite.plugins.solvers.heun import Heun
from suite.testing.oracles import Mixture, a_run, drive

SIGMA_MIN = 0.002
SCHEDULES: dict[str, type[Plugin]] = {
    name: cls for name, entry in installed().items() if "schedule" in implemented_hooks(cls := entry.load())
}
PLAIN = [name for name in sorted(SCHEDULES) if name != "grid"]  # that one is a file's


def times(plugin: Plugin, noise: NoiseSchedule, steps: int) -> Tensor:
    return plugin.schedule(noise=noise, run=a_run(steps=steps, tokens=256)).timesteps(noise, steps)  # pyright: ignore[reportAttributeAccessIssue]


def ratio(noise: NoiseSchedule, t: Tensor) -> Tensor:
    return torch.exp(-noise.log_snr(t) / 2)


@pytest.mark.parametrize("steps", [2, 10, 18, 60])
@pytest.mark.parametrize("name", PLAIN)
def test_no_grid_goes_below_the_least_level_of_variance_exploding_noise(name: str, steps: int) -> None:
    grid = times(SCHEDULES[name](), VE(), steps)
    sigmas = VE().sigma(grid)
    assert float(sigmas[-2]) >= SIGMA_MIN * (1 - 1e-9)
    assert grid[0] == 1 and grid[-1] == 0 and bool((grid.diff() < 0).all())


def test_karras_is_edms_own_grid() -> None:
    # EDM eq. 5 from 80 to 0.002 with rho = 7, then 0.
    part = torch.arange(18, dtype=torch.float64) / 17
    root = 80.0 ** (1 / 7) + part * (SIGMA_MIN ** (1 / 7) - 80.0 ** (1 / 7))
    torch.testing.assert_close(VE().sigma(times(Karras(), VE(), 18)[:-1]), root**7, rtol=1e-12, atol=0)


def test_uniform_times_are_it_too_because_rho_is_in_the_times() -> None:
    torch.testing.assert_close(times(Uniform(), VE(), 18), times(Karras(), VE(), 18), rtol=0, atol=1e-12)


def test_the_least_level_is_an_option_of_the_model() -> None:
    noise = VE(sigma_max=50.0, sigma_min=0.03)
    for plugin in (Karras(), LogSNR(), Exponential(), Uniform(), Beta(of="ratio")):
        assert float(noise.sigma(times(plugin, noise, 12)[-2])) == pytest.approx(0.03, rel=1e-9)
    with pytest.raises(ConfigError, match="expected 0 < sigma_min < sigma_max"):
        VE(sigma_min=80.0)


def test_what_the_user_says_of_the_end_is_done() -> None:
    assert float(times(Karras(low=0.1), VE(), 9)[-2]) == pytest.approx(0.1, abs=1e-9)
    assert float(times(LogSNR(low=0.05), VE(), 9)[-2]) == pytest.approx(0.05, abs=1e-9)
    assert float(times(FlowShift(shift=1.0, terminal=0.1), VE(), 9)[-2]) == pytest.approx(0.1, abs=1e-9)
    with pytest.raises(ConfigError, match="give both high and low"):
        times(Karras(high=0.2), VE(), 9)  # below the family's own end


def error(solver: Plugin, noise: NoiseSchedule, grid: Tensor) -> float:
    """Largest error on a mixture whose flow is known exactly, over starts of two deviations."""
    target = Mixture.two()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * noise.sigma(1.0)
    made = solver.solver(noise=noise, run=a_run(steps=len(grid) - 1))  # pyright: ignore[reportAttributeAccessIssue]
    return float((drive(made, grid, target.denoiser(noise), x) - target.flow_map(noise, x, 1.0, 0.0)).abs().max())


@pytest.mark.parametrize("grid", [Karras(), LogSNR()], ids=["karras", "log-snr"])
@pytest.mark.parametrize("solver", [Heun(), DPMpp3M()], ids=["heun", "dpmpp-3m"])
def test_ten_steps_are_no_worse_than_on_a_grid_that_ends_at_the_least_level(solver: Plugin, grid: Plugin) -> None:
    noise = VE()
    low = float(noise.time_at(-2 * torch.tensor(SIGMA_MIN, dtype=torch.float64).log()))
    given = error(solver, noise, times(type(grid)(high=1 - 1e-12, low=low), noise, 10))  # pyright: ignore[reportCallIssue]
    found = error(solver, noise, times(grid, noise, 10))
    far = error(solver, noise, times(type(grid)(high=0.98, low=0.01), noise, 10))  # pyright: ignore[reportCallIssue]
    assert found <= given * (1 + 1e-6)
    assert found < far / 1.5  # 0.01 is sigma = 8e-13: where these grids ended before


@pytest.mark.parametrize(
    "noise", [VPLinear(), VPTable.named("scaled_linear"), Cosine(), Flow(), Flow(3.0), TrigFlow()],
    ids=lambda n: n.family,
)  # fmt: skip
def test_other_families_have_the_grids_that_they_had(noise: NoiseSchedule) -> None:
    u = torch.linspace(1, 0, 12, dtype=torch.float64)
    for default, given in (
        (Karras(), Karras(high=0.98, low=0.01)),
        (LogSNR(), LogSNR(high=0.98, low=0.02)),
        (Exponential(), Exponential(high=0.98, low=0.02)),
        (Beta(of="ratio"), Beta(of="ratio", high=0.98, low=0.01)),
    ):
        assert torch.equal(times(default, noise, 11), times(given, noise, 11))
    assert torch.equal(times(Uniform(), noise, 11), u)
    assert torch.equal(times(Quadratic(), noise, 11), u**2)


@pytest.mark.parametrize("plugin", [Karras(), LogSNR(), Exponential(of="ratio")], ids=["karras", "log-snr", "exp"])
def test_levels_of_laplace_noise_reach_from_noise_to_data(plugin: Plugin) -> None:
    # At t = 0.02 and 0.98 its sigma / alpha is 0.45 and 2.2: most of the way would be two steps.
    noise = Laplace()
    levels = ratio(noise, times(plugin, noise, 10))
    assert float(levels[-2]) == pytest.approx(1 / 49, rel=1e-6) and float(levels[1]) > 5
    few = error(Heun(), noise, times(plugin, noise, 10))
    before = error(Heun(), noise, times(type(plugin)(high=0.98, low=0.02), noise, 10))  # pyright: ignore[reportCallIssue]
    assert few < before / 2


def test_a_stamp_from_before_an_option_means_its_default() -> None:
    def stamp(solver: str, schedule: str = "uniform") -> RunStamp:
        return RunStamp("m", "n", solver, 10, schedule, "")

    now = stamp("dpmpp-3m:lower_order_final=True", "karras:rho=7.0,high=None,low=None,of=ratio")
    assert stamp("dpmpp-3m", "karras:rho=7.0").differences(now) == []
    (said,) = stamp("dpmpp-3m:lower_order_final=False", "karras").differences(now)
    assert said == "the solver dpmpp-3m:lower_order_final=False, not dpmpp-3m:lower_order_final=True"
    (said,) = stamp("dpmpp-3m", "karras:low=0.01").differences(now)
    assert said.startswith("the schedule karras:low=0.01, not karras:")
    assert len(stamp("gone:was=here").differences(stamp("ddim"))) == 1
    assert stamp("gone:was=here").differences(stamp("gone:was=here")) == []
