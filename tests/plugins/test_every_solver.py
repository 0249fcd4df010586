"""What every solver of real vectors must do, made from the table of entry points: shapes of time, bf16, bad grids."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import Flow, Masked, NoiseSchedule, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.diffusion.solver import AdaptiveSolver, Solver
from suite.errors import ConfigError
from suite.hookspecs import HOOKS
from suite.host.discovery import Entry
from suite.host.manager import implemented_hooks
from suite.plugin import Plugin, build
from suite.testing import Gaussian, Mixture, drive
from suite.testing.checks import CONTINUOUS
from suite.testing.oracles import a_run

ROOT = Path(__file__).resolve().parents[2]
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["suite"]


def _plugins() -> dict[str, Any]:
    """Solvers of real vectors with the options with which they act."""
    found = {}
    for name, target in TABLE.items():
        cls = Entry(name, target, "efficient-diffusion-suite", "this").load()
        if "solver" in implemented_hooks(cls):
            plugin = build(cls, cls.acting_options, name=name)
            try:
                if not plugin.solver(noise=VPLinear(), run=a_run()).facts.discrete:
                    found[name] = plugin
            except ConfigError:
                continue  # a solver of tokens
    return found


PLUGINS = _plugins()
#: They move the whole sample at once, and say so.
ONE_TIME = {"diffusers", "dopri5", "ggf", "restart"}
every = pytest.mark.parametrize("name", PLUGINS)
by_groups = pytest.mark.parametrize("name", sorted(set(PLUGINS) - ONE_TIME))


def solver_of(name: str, noise: NoiseSchedule, steps: int = 8) -> Solver:
    return PLUGINS[name].solver(noise=noise, run=a_run(steps=steps))


class Silent(SampleRng):
    """Streams of zeros, so that two runs with noise of different shapes can be compared."""

    def normal(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        out = torch.zeros(len(self.seeds), *shape)
        return out if like is None else out.to(like)


def steps_of(name: str) -> int:
    return max(8, solver_of(name, VPLinear()).facts.min_steps)


# ---- shapes of time ----------------------------------------------------------------------------


@by_groups
def test_every_group_of_a_sample_has_its_own_times(name: str) -> None:
    # Two groups (frames) of one sample on two grids are two samples on those grids.
    noise, steps, target = VPLinear(), steps_of(name), Gaussian()
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grids = torch.stack([even, even**1.5], 1)
    x = SampleRng((0, 1, 2)).normal((2, 3)).double()
    got = drive(
        solver_of(name, noise, steps),
        grids[:, None].expand(-1, 3, -1),
        target.denoiser(noise),
        x,
        rng=Silent((0, 1, 2)),
    )
    for group in range(2):
        alone = drive(
            solver_of(name, noise, steps), grids[:, group], target.denoiser(noise), x[:, group], rng=Silent((0, 1, 2))
        )
        torch.testing.assert_close(got[:, group], alone, rtol=1e-9, atol=1e-9)


@by_groups
def test_a_time_for_each_sample(name: str) -> None:
    noise, steps = Flow(), steps_of(name)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x, denoise = SampleRng((0, 1, 2)).normal((4,)).double(), Mixture.two((4,)).denoiser(noise)
    one = drive(solver_of(name, noise, steps), grid, denoise, x)
    many = drive(solver_of(name, noise, steps), grid[:, None].expand(-1, 3), denoise, x)
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(ONE_TIME & set(PLUGINS)))
def test_those_that_move_all_at_once_say_so(name: str) -> None:
    noise, steps = Flow(), steps_of(name)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grids = torch.stack([even, even**1.5], 1)[:, None].expand(-1, 3, -1)
    with pytest.raises(ConfigError, match=r"per-group|one time for all"):
        drive(solver_of(name, noise, steps), grids, Gaussian().denoiser(noise), torch.ones(3, 2, 3).double())


# ---- precision ---------------------------------------------------------------------------------


@every
def test_a_bf16_network_with_a_float32_state_stays_finite(name: str) -> None:
    for noise in CONTINUOUS:
        exact = Mixture.two((3,)).denoiser(noise)

        def network(x: Tensor, t: Tensor, exact: Any = exact) -> Tensor:
            return exact(x.to(torch.bfloat16).float(), t).to(torch.bfloat16).float()

        for steps in sorted({max(4, solver_of(name, noise).facts.min_steps), 20}):
            plugin = PLUGINS[name]
            if isinstance(solver_of(name, noise), AdaptiveSolver):
                # A tolerance below the network's own rounding is not to be had.
                loose = {"dopri5": {"tolerance": 0.02}, "ggf": {"relative": 0.5, "absolute": 0.1}}[name]
                plugin = build(type(plugin), loose, name=name)
            rng = SampleRng((0, 1))
            x = float(noise.sigma(1.0)) * rng.normal((3,))
            solver = plugin.solver(noise=noise, run=a_run(steps=steps))
            out = drive(solver, torch.linspace(1, 0, steps + 1, dtype=torch.float64), network, x, rng=rng)
            assert out.dtype is torch.float32 and out.isfinite().all(), f"{noise.family}, {steps} steps"
            # A few steps may be too long for a method. PeRFlow's lines are bounded for distilled networks only;
            # PNDM's coefficients are for equal steps, and ResShift's sigma / alpha grows by a factor in each.
            bounded = steps == 20 and name != "perflow" and (name, noise.family) != ("pndm", "resshift")
            assert not bounded or float(out.abs().max()) < 20, f"{noise.family}, {steps} steps: {out}"


# ---- bad grids ---------------------------------------------------------------------------------


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the denoiser was evaluated")


@every
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.2, 0.4, 0.6, 0.8, 0.9, 1.0], "do not decrease"),
        ([1.0, 0.8, 0.8, 0.4, 0.2, 0.0], "do not decrease"),
        ([1.2, 0.8, 0.6, 0.4, 0.2, 0.0], r"outside \[0, 1\]"),
        ([1.0, 0.8, 0.5, float("nan"), 0.2, 0.0], r"outside \[0, 1\]"),
        ([1.0, 0.8, 0.6, 0.4, 0.2, -0.1], r"outside \[0, 1\]"),
    ],
)
def test_a_bad_grid_is_refused_before_the_first_evaluation(name: str, times: list[float], message: str) -> None:
    grid = torch.tensor(times, dtype=torch.float64)
    with pytest.raises(ConfigError, match=message):
        drive(solver_of(name, Flow()), grid, never, torch.zeros(1, 1))
    problem: Any = Problem(torch.zeros(1, 1), grid, None, None, solver_of(name, Flow()), Flow(), None, a_run())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=message):
        march(problem)


@every
def test_too_few_steps_are_refused_before_the_first_evaluation(name: str) -> None:
    solver = solver_of(name, Flow())
    fewest = solver.facts.min_steps
    if fewest == 1:
        grid = torch.ones(1, dtype=torch.float64)
    else:
        grid = torch.linspace(1, 0, fewest, dtype=torch.float64)
    with pytest.raises(ConfigError, match=f"needs at least {fewest} steps?; got {fewest - 1}"):
        drive(solver, grid, never, torch.zeros(1, 1))


@every
def test_a_token_model_is_refused_or_named(name: str) -> None:
    # Whatever a hook returns for tokens, its facts let the engine refuse it.
    try:
        solver = PLUGINS[name].solver(noise=Masked(), run=a_run())
    except ConfigError:
        return
    assert not solver.facts.discrete


@every
def test_it_says_what_it_is(name: str) -> None:
    plugin: Plugin = PLUGINS[name]
    assert plugin.summary and plugin.paper
    low, _, high = plugin.orders.partition("-")
    assert int(low) <= solver_of(name, VPLinear()).facts.order <= int(high or low)
    assert implemented_hooks(type(plugin)) == ["solver"] and "solver" in HOOKS
