"""The order of every solver, fitted on 80 to 640 steps in double precision to targets whose answer is exact.

One table: what a plugin says of its order (`orders`, and its solver's facts) has a row here for each order that it
names, and the fit lies within 0.1 of it. Deterministic solvers are measured on a mixture, whose denoiser is not
affine, by the states they reach; multistep ones from exact starting values. Solvers that draw noise are measured on a
Gaussian by the exact mean and variance of their samples, without sampling. Log-SNR runs between finite ends.
"""

import itertools
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.diffusion.noise import VE, Flow, NoiseSchedule, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Solver
from suite.errors import ConfigError
from suite.host.discovery import Entry
from suite.host.manager import implemented_hooks
from suite.plugin import build
from suite.plugins.solvers.dopri5 import Dopri5Solver
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.testing import Gaussian, Mixture
from suite.testing.oracles import Target, a_run, errors, log_snr_times, observed_order, reference, slope

sys.path.insert(0, str(Path(__file__).parent))
from _theirs import OLD_NUMPY

ROOT = Path(__file__).resolve().parents[2]
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["suite"]
#: The ends of the range: between them the error falls by 8, 64, 512 and 4096 for orders 1 to 4.
STEPS = (80, 640)
INNER = (-4.0, 4.0)
ALL = {"low": 0.0, "high": 1.0}
FULL = {"lower_order_final": False}
#: Narrow data: the error of second order in the law is far above the terms that follow it.
NARROW, WIDE = Gaussian(0.7, 0.05), Gaussian(0.7, 0.5)
FLOW = Flow()


@dataclass(frozen=True)
class Row:
    """A plugin with options, the order that is expected, and what it is measured on."""

    plugin: str
    order: int
    options: dict[str, Any] = field(default_factory=dict)
    noise: NoiseSchedule = FLOW
    ends: tuple[float, float] = INNER
    law: Gaussian = NARROW

    @property
    def id(self) -> str:
        """For pytest."""
        options = "/".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.plugin}:{options}".rstrip(":") + f"-{self.noise.family}"

    def solver(self, noise: NoiseSchedule) -> Solver:
        """Made as the hook makes it."""
        return made(self.plugin, self.options).solver(noise=noise, run=a_run())


def made(name: str, options: dict[str, Any] | None = None) -> Any:
    """A first-party plugin."""
    return build(Entry(name, TABLE[name], "efficient-diffusion-suite", "this").load(), options or {}, name=name)


THEIRS = {"DDIMScheduler": 1, "EulerDiscreteScheduler": 1, "HeunDiscreteScheduler": 2}
ROWS = [
    # One step, deterministic.
    Row("ddim", 1), Row("euler", 1), Row("euler", 1, noise=VPLinear()), Row("tcd", 1, {"gamma": 0.0}),
    Row("heun", 2), Row("heun", 2, noise=VPLinear()), Row("edm", 1, {"order": 1}), Row("edm", 2),
    Row("restart", 2, {"jumps": 0}), Row("genie", 2), Row("dpmpp-2s", 2),
    *(Row("dpm", p, {"order": p}) for p in (1, 2, 3)),
    # With history.
    Row("dpmpp-2m", 2), Row("dpmpp-2m", 2, noise=VPLinear()), Row("dpmpp-3m", 3),
    # Their error changes its sign on wider intervals; VP, because in flow noise t is nearly rho.
    *(Row("deis", p, {"order": p, "variable": v}, VPLinear() if v == "t" else Flow(), (-3.0, 3.0))
      for v in ("t", "rho", "log-rho", "rho-rk") for p in (1, 2, 3, 4)),
    *(Row("lms", p, {"order": p}, ends=(-3.0, 3.0)) for p in (1, 2, 3, 4)),
    # Of fourth order the next term is opposite: wider, its part in 80 steps is below a tenth.
    *(Row("unipc", p + c, {"order": p, "variant": v, "corrector": bool(c), **FULL},
          ends=(-6.0, 6.0) if p + c == 4 else INNER)
      for p in (1, 2, 3) for v in ("bh1", "bh2") for c in (0, 1)),
    # A last step of first order wherever it ends: its error is of second order, and that of the whole too.
    Row("unipc", 2), Row("unipc", 2, {"order": 3}),
    Row("sa", 2, {"order": 3, "corrector": 4, "tau": 0.0, "lower_order_final": True}),
    # Not 4: the coefficients are those of equal steps of another equation.
    Row("pndm", 2), Row("pndm", 2, {"start": "lower-order"}),
    *(Row("sa", min(c, p + 1) if c else p, {"order": p, "corrector": c, "tau": 0.0},
          ends=(-6.0, 6.0) if c == 4 else INNER)
      for p, c in ((1, 0), (2, 0), (3, 0), (4, 0), (1, 2), (2, 3), (3, 4))),
    # In law.
    *(Row("ddim", 1, {"eta": eta}) for eta in (0.5, 1.0)),
    *(Row("ancestral", 1, {"variance": v}) for v in ("fixed-small", "fixed-large")),
    *(Row("euler-maruyama", 1, {"form": f}) for f in ("reverse-diffusion", "time")),
    # A Langevin step of fixed size has a bias that no grid mends. It is small here: the order is the predictor's.
    *(Row("pc", 1, {"predictor": p, "corrections": c, "snr": 0.01}, ends=(-3.0, 3.0))
      for p in ("reverse-diffusion", "ancestral") for c in (0, 1)),
    Row("sde-dpmpp", 1, {"order": 1}, ends=(-3.0, 3.0)), Row("sde-dpmpp", 2, ends=(-3.0, 3.0)),
    *(Row("sa", min(c or p, 2), {"order": p, "corrector": c, **ALL}, ends=(-3.0, 3.0))
      for p, c in ((1, 0), (2, 0), (1, 2), (2, 2))),
    Row("sa", 2, {"order": 3, "corrector": 3, **ALL}, law=WIDE),  # noise caps the order at 2
    Row("edm", 1, {"order": 1, "churn": 3.0}), Row("edm", 2, {"churn": 3.0}),
    # As much noise is added however fine the grid is, and it is too large.
    *(Row("edm", 0, {"order": p, "churn": 3.0, "inflation": 1.5}) for p in (1, 2)),
    Row("restart", 2, {"low": 0.25, "high": 0.6}),
    # A bias stays, however fine the grid.
    Row("consistency", 0), Row("lcm", 0), Row("tcd", 0), Row("langevin", 0, ends=(-3.0, 3.0)),
    # The reference: classes of diffusers on our grid.
    *(Row("diffusers", order, {"name": name}) for name, order in THEIRS.items()),
]  # fmt: skip
#: Measured by tests of their own, below and in the files named.
ELSEWHERE = {
    "dopri5": "picks its own times: test_dopri5_is_of_fifth_order_at_least",
    "ggf": "picks its own times, of law 1 by tolerance: tests/plugins/test_adaptive_solvers.py",
    "perflow": "needs a grid that stops at its windows: test_perflow_is_of_first_order_in_flow_noise_only",
}


@OLD_NUMPY
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_the_order_is_the_one_that_is_declared(row: Row) -> None:
    solver = row.solver(row.noise)
    target: Target = row.law if solver.facts.stochastic else Mixture.two()
    if row.plugin == "diffusers":
        # Its steps are slow, and where its tables are of single precision finer ones are at the rounding error.
        steps: tuple[int, ...] = (20, 80)
    else:
        steps = STEPS
    with torch.inference_mode():  # as the engine samples
        got = observed_order(row.solver, row.noise, steps, target, row.ends)
    assert got == pytest.approx(row.order, abs=0.1)
    assert solver.facts.order == row.order


def test_every_solver_of_real_vectors_has_a_row_for_each_order_that_it_names() -> None:
    measured: dict[str, set[int]] = {}
    for row in ROWS:
        measured.setdefault(row.plugin, set()).add(row.order)
    continuous = set()
    for name, target in TABLE.items():
        cls = Entry(name, target, "efficient-diffusion-suite", "this").load()
        if "solver" not in implemented_hooks(cls):
            continue
        plugin: Any = build(cls, {}, name=name)
        try:
            if plugin.solver(noise=VPLinear(), run=a_run()).facts.discrete:
                continue
        except ConfigError:
            continue  # a solver of tokens
        continuous.add(name)
        low, _, high = plugin.orders.partition("-")
        if name not in ELSEWHERE and name != "diffusers":  # whose classes are of the orders that they are
            assert measured.get(name) == set(range(int(low), int(high or low) + 1)), name
    assert set(measured) | set(ELSEWHERE) == continuous


# ---- those that need a grid of their own --------------------------------------------------------


@pytest.mark.parametrize(("noise", "order"), [(Flow(), 1), (VPLinear(), 0)], ids=["flow", "vp-linear"])
def test_perflow_is_of_first_order_in_flow_noise_only(noise: NoiseSchedule, order: int) -> None:
    solver, target, values = made("perflow").solver(noise=noise, run=a_run()), Mixture.two(), []
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for count in STEPS:
        times = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        state, denoise, got = solver.begin(a_run(steps=count), times), target.denoiser(noise), x
        for t, s in itertools.pairwise(times):
            got, state = solver.step(denoise, got, t, s, state, SampleRng(range(9)))
        values.append(float((got - target.flow_map(noise, x, 1.0, 0.0)).abs().max()))
    fit = slope(STEPS, values)
    # Of order 0 the error does not fall; here it rises a little to what it is in the limit.
    assert fit == pytest.approx(1, abs=0.1) if order else fit < 0.1
    assert solver.facts.order == order


def test_dopri5_is_of_fifth_order_at_least() -> None:
    # At a tolerance that accepts every trial each interval of a grid is covered by the same number of steps, a short
    # trial one and the rest, which are more even in coarse grids: so the fit is steeper than the order.
    noise, target, counts, values = Flow(), Mixture.two(), (10, 20, 40), []
    solver, denoise, x = Dopri5Solver(noise, 0.1, 1000), target.denoiser(noise), torch.tensor([[-1.3], [1.9]]).double()
    for count in counts:
        times = log_snr_times(noise, count)
        first = got = x * noise.sigma(times[0])
        for t, s in itertools.pairwise(times):
            got, _ = solver.step(denoise, got, t, s, None, SampleRng((0, 1)))
        values.append(float((got - target.flow_map(noise, first, times[0], times[-1])).abs().max()))
    assert slope(counts, values) > solver.facts.order - 0.1


# ---- the ruler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [VPLinear(), VE(10.0), Flow()], ids=lambda n: n.family)
def test_the_exact_flow_of_a_mixture_is_that_of_the_reference_integrator(noise: NoiseSchedule) -> None:
    target, (t, s) = Mixture.two(), log_snr_times(noise, 1)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * noise.sigma(t)
    exact = target.flow_map(noise, x, t, s)
    torch.testing.assert_close(exact, reference(target, noise, x, t, s, 400), rtol=0, atol=1e-8)
    torch.testing.assert_close(target.flow_map(noise, exact, s, t), x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="samples of one element"):
        Mixture.two((2,)).flow_map(noise, x, t, s)


def test_a_solver_that_claims_too_much_is_found_out() -> None:
    # Two-step extrapolation claims third order: its fit says second, whatever starting values it is given.
    class Boasting(DPMpp2MSolver):
        facts = replace(DPMpp2MSolver.facts, order=3)

    assert slope((80, 160), errors(Boasting(Flow()), Flow(), Mixture.two(), (80, 160))) == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match="measured on a Gaussian"):
        observed_order(lambda n: made("ancestral").solver(noise=n, run=a_run()), Flow(), (20, 40), Mixture.two())
