"""Lower orders in the last steps, as diffusers has them; and where a high order with noise is not steady."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.diffusion.noise import VE, Flow, NoiseSchedule, VPLinear, VPTable
from suite.errors import ConfigError
from suite.plugins.schedules.karras import Karras
from suite.plugins.schedules.uniform import Uniform
from suite.plugins.solvers.deis import DEIS
from suite.plugins.solvers.diffusers import Diffusers
from suite.plugins.solvers.dpmpp_3m import DPMpp3M
from suite.plugins.solvers.lms import LMS
from suite.plugins.solvers.sa import SA, SASolver
from suite.plugins.solvers.unipc import UniPC
from suite.recipe import Recipe
from suite.testing.oracles import Gaussian, Mixture, a_run, drive, moments

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import OLD_NUMPY

pytestmark = OLD_NUMPY
#: Interior grids: to clean data every last step is of first order, and nothing could be told apart.
GRIDS = {steps: torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64) for steps in (1, 2, 3, 10, 14, 15, 20)}
NOISES = [VPLinear(), VPTable.named("scaled_linear"), VE(10.0), Flow()]
END = "final_sigmas_type=sigma_min"


def final(solver: Any, noise: NoiseSchedule, steps: int) -> torch.Tensor:
    start = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None] * float(noise.sigma(0.9))
    made = solver.solver(noise=noise, run=a_run(steps=steps))
    return drive(made, GRIDS[steps], Mixture.two().denoiser(noise), start)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers_either_way(order: int, wanted: bool, noise: NoiseSchedule) -> None:
    for steps in (2, 10, 20):
        config = (f"lower_order_final={str(wanted).lower()}", END, f"solver_order={order}", "solver_type=bh2")
        ours = final(UniPC(order, "bh2", lower_order_final=wanted), noise, steps)
        theirs = final(Diffusers("UniPCMultistepScheduler", config), noise, steps)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_deis_equals_diffusers_either_way(order: int, wanted: bool, noise: NoiseSchedule) -> None:
    for steps in (2, 10, 14, 15):
        config = (f"lower_order_final={str(wanted).lower()}", f"solver_order={order}")
        ours = final(DEIS(order, "log-rho", lower_order_final=wanted), noise, steps)
        theirs = final(Diffusers("DEISMultistepScheduler", config), noise, steps)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
def test_sa_equals_diffusers_either_way(wanted: bool) -> None:
    # Their default tau counts timesteps from 200 to 800, and on our grid there are fewer: no noise anywhere.
    for noise in NOISES:
        config = (f"lower_order_final={str(wanted).lower()}",)
        ours = final(SA(2, 2, tau=0.0, adjusted=True, lower_order_final=wanted), noise, 10)
        torch.testing.assert_close(ours, final(Diffusers("SASolverScheduler", config), noise, 10), rtol=1e-5, atol=1e-5)


def test_the_default_is_that_of_diffusers() -> None:
    for plugin, name in ((UniPC(), "UniPCMultistepScheduler"), (DEIS(2, "log-rho"), "DEISMultistepScheduler")):
        theirs = final(Diffusers(name, (END,) if name.startswith("Uni") else ()), Flow(), 10)
        torch.testing.assert_close(final(plugin, Flow(), 10), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [DPMpp3M, lambda **o: DEIS(3, **o), lambda **o: DEIS(4, **o)], ids=["3m", "3", "4"])
def test_only_short_runs_end_with_lower_orders(make: Any) -> None:
    for steps, differs in ((10, True), (14, True), (15, False), (20, False)):
        low, full = (final(make(lower_order_final=wanted), Flow(), steps) for wanted in (True, False))
        assert torch.equal(low, full) is not differs


def test_lms_has_none_as_in_k_diffusion() -> None:
    assert torch.equal(final(LMS(3), Flow(), 10), final(DEIS(3, "rho", lower_order_final=False), Flow(), 10))
    assert not torch.equal(final(LMS(3), Flow(), 10), final(DEIS(3, "rho"), Flow(), 10))


def test_the_last_step_of_a_short_run_is_ddims() -> None:
    # So the whole does not depend on how the last evaluation would be extrapolated: one step alone is DDIM's.
    from suite.plugins.solvers.ddim import DDIM

    for plugin in (UniPC(3), DEIS(3), DPMpp3M()):
        torch.testing.assert_close(final(plugin, Flow(), 1), final(DDIM(), Flow(), 1), rtol=0, atol=1e-12)


def width(noise: NoiseSchedule, order: int, steps: int, grid: Any) -> float:
    """Standard deviation of the samples over that of narrow Gaussian data."""
    target = Gaussian(0.7, 0.05)
    times = grid.schedule(noise, a_run(steps=steps)).timesteps(noise, steps)
    solver = SASolver(noise, order, order, 1.0, (0.0, 1.0), False)
    mean, variance = target.marginal(noise, times[0])
    return float((moments(solver, times, target.denoiser(noise), mean, variance)[1] / target.variance).sqrt())


def test_high_orders_with_noise_are_not_steady() -> None:
    for noise in (VE(), Flow()):
        assert width(noise, 2, 10, Karras()) < 1.6
        assert width(noise, 3, 10, Karras()) > 1.9  # narrow data come out about twice as wide, or more
        assert max(width(noise, 3, 20, grid) for grid in (Karras(), Uniform())) < 1.25
        assert width(noise, 4, 10, Karras()) > 2.5
    assert width(Flow(), 4, 100, Uniform()) > 1.8


@pytest.mark.parametrize("corrector", [0, 2, 4])
def test_so_they_are_refused(corrector: int) -> None:
    three, four = SA(3, corrector), SA(4, corrector)
    with pytest.raises(ConfigError, match=r"sa: order = 3 with noise .* in 19 steps.* or 20 steps, or tau=0"):
        three.solver(noise=Flow(), run=a_run(steps=19))
    with pytest.raises(ConfigError, match=r"sa: order = 4 with noise .*take sa:order=2, .* as this is, or tau=0"):
        four.solver(noise=Flow(), run=a_run(steps=1000))
    with pytest.raises(ConfigError, match="take sa:order=2"):
        three.check(Recipe(steps=10), None)  # pyright: ignore[reportArgumentType]
    three.solver(noise=Flow(), run=a_run(steps=20))
    SA(4, corrector, tau=0.0).solver(noise=Flow(), run=a_run(steps=2))
