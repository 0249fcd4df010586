"""Schedulers of diffusers as solvers: on our grids, in every noise family, equal to ours where the method is one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.diffusion.noise import VE, Flow, Masked, NoiseSchedule, Sqrt, VPLinear, VPTable
from suite.diffusion.prediction import Prediction
from suite.diffusion.solver import Solver
from suite.errors import ConfigError
from suite.host.discovery import installed
from suite.host.manager import Manager, load
from suite.plugins.solvers._diffusers import REFUSED, classes
from suite.plugins.solvers.ancestral import AncestralSolver
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEISSolver
from suite.plugins.solvers.diffusers import Diffusers
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.plugins.solvers.sa import SASolver
from suite.plugins.solvers.sde_dpmpp import SDEDPMppSolver
from suite.plugins.solvers.unipc import UniPCSolver
from suite.recipe import from_options
from suite.testing import Mixture, drive
from suite.testing.oracles import a_run

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import KINDS, OLD_NUMPY, START, as_time

Factory = Callable[[NoiseSchedule], Solver]
NOISES = [VPLinear(), VPTable.named("scaled_linear"), VE(10.0), Flow()]
#: No end is reached: there ours and theirs have different ways out of an infinite log-SNR.
INSIDE = torch.linspace(0.9, 0.1, 11, dtype=torch.float64)
FULL = ("lower_order_final=false", "final_sigmas_type=sigma_min")
ALL = (0.0, 1.0)

SAME: dict[str, tuple[Diffusers, Factory]] = {
    "ddim": (Diffusers("DDIMScheduler"), lambda n: DDIMSolver(n, 0.0)),
    "ddim-eta": (Diffusers("DDIMScheduler", eta=0.7), lambda n: DDIMSolver(n, 0.7)),
    "euler": (Diffusers("EulerDiscreteScheduler"), lambda n: DDIMSolver(n, 0.0)),
    "euler-ancestral": (Diffusers("EulerAncestralDiscreteScheduler"), lambda n: AncestralSolver(n, "fixed-small")),
    "flow-euler": (Diffusers("FlowMatchEulerDiscreteScheduler"), lambda n: DDIMSolver(n, 0.0)),
    "heun": (Diffusers("HeunDiscreteScheduler"), HeunSolver),
    "lms": (Diffusers("LMSDiscreteScheduler"), lambda n: DEISSolver(n, 4, "rho")),
    "dpmpp-2m": (Diffusers("DPMSolverMultistepScheduler", FULL), DPMpp2MSolver),
    "sde-dpmpp-1": (
        Diffusers("DPMSolverMultistepScheduler", (*FULL, "solver_order=1", "algorithm_type=sde-dpmsolver++")),
        lambda n: SDEDPMppSolver(n, 1),
    ),
    "sde-dpmpp-2": (
        Diffusers("DPMSolverMultistepScheduler", (*FULL, "algorithm_type=sde-dpmsolver++")),
        lambda n: SDEDPMppSolver(n, 2),
    ),
    "deis-2": (Diffusers("DEISMultistepScheduler", (FULL[0],)), lambda n: DEISSolver(n, 2, "log-rho")),
    "deis-3": (
        Diffusers("DEISMultistepScheduler", (FULL[0], "solver_order=3")), lambda n: DEISSolver(n, 3, "log-rho"),
    ),
    "unipc-1": (
        Diffusers("UniPCMultistepScheduler", (*FULL, "solver_order=1", "solver_type=bh1")),
        lambda n: UniPCSolver(n, 1, "bh1", True),
    ),
    "unipc-2": (Diffusers("UniPCMultistepScheduler", FULL), lambda n: UniPCSolver(n, 2, "bh2", True)),
    "unipc-3": (
        Diffusers("UniPCMultistepScheduler", (*FULL, "solver_order=3")), lambda n: UniPCSolver(n, 3, "bh2", True),
    ),
}  # fmt: skip
pytestmark = OLD_NUMPY


def both(plugin: Diffusers, factory: Factory, noise: NoiseSchedule, times: torch.Tensor) -> tuple[Any, Any]:
    """Theirs and ours on one grid, from one start, with one set of streams."""
    denoise, start = Mixture.two().denoiser(noise), START * float(noise.sigma(times[0]))
    theirs = drive(plugin.solver(noise=noise, run=a_run()), times, denoise, start)
    return theirs, drive(factory(noise), times, denoise, start)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
@pytest.mark.parametrize("name", SAME)
def test_ours_is_theirs_on_one_grid(name: str, noise: NoiseSchedule) -> None:
    # Theirs takes Heun's last step by Euler's rule, wherever it ends; ours where it ends at clean data.
    times = torch.cat([INSIDE, as_time(0.0)]) if name == "heun" else INSIDE
    theirs, ours = both(*SAME[name], noise, times)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_what_a_network_predicts_makes_no_difference(name: str, kind: Prediction) -> None:
    noise = Flow()
    config = () if name == "DDIMScheduler" else FULL
    factory: dict[str, Factory] = {
        "DDIMScheduler": lambda n: DDIMSolver(n, 0.0),
        "DPMSolverMultistepScheduler": DPMpp2MSolver,
        "UniPCMultistepScheduler": lambda n: UniPCSolver(n, 2, "bh2", True),
    }
    theirs, ours = both(Diffusers(name, (*config, f"prediction_type={kind}")), factory[name], noise, INSIDE)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.family)
def test_sa_is_theirs_but_for_the_timesteps_at_which_it_draws(noise: NoiseSchedule) -> None:
    # Their default tau counts timesteps from 200 to 800, and on our grid there are ten: no noise anywhere.
    theirs, ours = both(
        Diffusers("SASolverScheduler", ("lower_order_final=false",)), lambda n: SASolver(n, 2, 2, 0.0, ALL, True),
        noise, INSIDE,
    )  # fmt: skip
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [*NOISES, Sqrt()], ids=lambda n: n.family)
def test_a_whole_run_is_theirs_to_the_last_bit_of_a_double(noise: NoiseSchedule) -> None:
    # From alpha = 0 and to clean data or, with the square-root schedule, to data with noise left.
    times = torch.linspace(1, 0, 9, dtype=torch.float64) ** 1.5
    theirs, ours = both(*SAME["ddim"], noise, times)
    # Their table holds alpha_bar, which cannot tell noise of 3e-9 from none.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-7 if noise.family == "ve" else 1e-12)


def test_heun_of_flow_matching_cannot_take_a_grid() -> None:
    with pytest.raises(ConfigError, match="FlowMatchHeunDiscreteScheduler: it cannot be given our noise schedule"):
        Diffusers("FlowMatchHeunDiscreteScheduler").solver(noise=Flow(), run=a_run())


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_class_runs_to_finite_data(name: str) -> None:
    noise, calls = VPLinear(), []
    denoise = Mixture.two().denoiser(noise)

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return denoise(x, t)

    solver = Diffusers(name).solver(noise=noise, run=a_run())
    out = drive(solver, torch.linspace(0.98, 0, 11, dtype=torch.float64), counted, START)
    assert out.isfinite().all() and float(out.abs().max()) < 20 and out.dtype is START.dtype
    assert len(calls) == solver.evaluations(10)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Diffusers("EulerDiscretScheduler"), "no scheduler 'EulerDiscretScheduler'; did you mean EulerDiscrete"),
        (Diffusers("Nothing"), "no scheduler 'Nothing'; it has CogVideoXDDIMScheduler"),
        (Diffusers("DDIMScheduler", ("sover_order=3",)), "DDIMScheduler has no option 'sover_order'"),
        (Diffusers("UniPCMultistepScheduler", ("solver_oder=3",)), "did you mean solver_order"),
        (Diffusers("ScoreSdeVeScheduler"), "it cannot be given our noise schedule"),
        *((Diffusers(name), why) for name, why in REFUSED.items()),
    ],
)  # fmt: skip
def test_unknown_classes_and_options_are_refused(plugin: Diffusers, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plugin.solver(noise=VPLinear(), run=a_run())
    assert message in str(refused.value)


def test_a_grid_that_it_cannot_take_is_refused_before_an_evaluation() -> None:
    def never(x: Any, t: Any) -> Any:
        raise AssertionError("evaluated")

    solver = Diffusers().solver(noise=Flow(), run=a_run())
    with pytest.raises(ConfigError, match="one time for all; this grid has 2 a sample"):
        drive(solver, INSIDE[:, None].expand(-1, 2), never, START)
    with pytest.raises(ConfigError, match="must know the whole grid"):
        solver.init(a_run())
    wrong = Diffusers("DPMSolverMultistepScheduler", ("solver_order=7",)).solver(noise=VPLinear(), run=a_run())
    with pytest.raises(ConfigError, match="do not decrease"):
        drive(wrong, as_time(0.2, 0.9), never, START)
    other = Diffusers("DEISMultistepScheduler", ("solver_type=nothing",)).solver(noise=VPLinear(), run=a_run())
    with pytest.raises(ConfigError, match="DEISMultistepScheduler does not take this grid of 10 steps"):
        drive(other, INSIDE, never, START)
    with pytest.raises(ConfigError, match="steps real vectors; a token model wants"):
        Diffusers().solver(noise=Masked(), run=a_run())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diffusers(config=("solver_order",)), "expected key=value"),
        (lambda: Diffusers(eta=2.0), "eta = 2.0: expected a number from 0 to 1"),
        (lambda: Diffusers("no class"), "expected a class"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)


def test_hook_solver() -> None:
    text = "diffusers:name=UniPCMultistepScheduler,config=solver_order=3/lower_order_final=false"
    manager = Manager(load(from_options(solver=text), installed(), "image"))
    solver: Any = manager.solver(Flow(), a_run())
    assert solver.name == "UniPCMultistepScheduler" and solver.facts.order == 3 and solver.facts.multistep
    assert dict(solver.config) == {"solver_order": "3", "lower_order_final": "false"}
    assert Diffusers("EulerAncestralDiscreteScheduler").effects == {"stochastic-step"}
    assert Diffusers("HeunDiscreteScheduler").effects == {"repeated-evaluations"}
