"""Caches and solvers that go back in time, begin in the middle, or ask twice for one time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Flow, VPLinear
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.diffusion.solver import AdaptiveSolver
from suite.diffusion.start import Start, truncated
from suite.errors import ConfigError, RuleError
from suite.host.discovery import installed
from suite.host.manager import implemented_hooks
from suite.host.plan import make_plan
from suite.plugin import Plugin, build
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.text_kv import TextKV
from suite.plugins.solvers.ddim import DDIM
from suite.plugins.solvers.edm import EDM
from suite.plugins.solvers.heun import Heun
from suite.plugins.solvers.restart import Restart
from suite.rules import BOOK, Member, check
from suite.testing.oracles import Gaussian, a_run, drive

sys.path.insert(0, str(Path(__file__).parent))
import itertools

import _tiny
from _tiny import Setup

STEPS = 12
REAL = [
    name
    for name, entry in sorted(installed().items())
    if entry.distribution == "efficient-diffusion-suite"
    and entry.target.startswith("suite.plugins.solvers.")
    and "solver" in implemented_hooks(entry.load())
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in REAL),
    ("edm", {"churn": 20.0}),
    ("restart", {"jumps": 2}),
]


def times_of(plugin: Any) -> list[float] | None:
    """The times at which a solver evaluates, in order; None if it steps tokens, picks its times, or needs a model."""
    for noise in (VPLinear(), Flow()):
        try:
            solver: Any = plugin.solver(noise, a_run(steps=STEPS))
        except ConfigError:
            continue
        if isinstance(solver, AdaptiveSolver) or solver.facts.discrete or solver.facts.min_steps > STEPS:
            return None
        seen: list[float] = []
        inner = Gaussian().denoiser(noise)

        def denoise(x: Tensor, t: Tensor, inner: Any = inner, seen: list[float] = seen) -> Tensor:
            seen.append(float(t.max()))
            return inner(x, t)

        grid = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drive(solver, grid, denoise, x)
        return seen
    return None


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_whoever_goes_up_in_time_says_so(name: str, options: dict[str, Any]) -> None:
    """C29 in one place: the word is what keeps every cache of steps away, so it must be true of every solver."""
    plugin = build(installed()[name].load(), options, name=name)
    seen = times_of(plugin)
    if seen is None:
        return
    rises = any(later > before + 1e-9 for before, later in itertools.pairwise(seen))
    assert rises == ("time-jumps" in plugin.effects), seen


def test_some_solver_goes_up() -> None:
    """The test above can fail."""
    assert max(map(len, filter(None, map(times_of, [Restart(jumps=2), EDM(churn=20.0)])))) > STEPS


@pytest.mark.parametrize("cache", ["fora", "first-block"])
@pytest.mark.parametrize("solver", ["restart", "edm:churn=20"])
def test_caches_of_steps_are_kept_from_jumps(cache: str, solver: str) -> None:
    with pytest.raises(RuleError, match=rf"{cache}.*going back to a noisier time.*rule C29"):
        make_plan("image", {"solver": solver, "cache": [cache], "steps": 10})
    make_plan("image", {"solver": "edm", "cache": [cache], "steps": 10})
    make_plan("image", {"solver": solver, "cache": ["text-kv"], "steps": 10})


@pytest.mark.parametrize("plugin", [FORA(3), FirstBlock(0.3)], ids=lambda p: type(p).__name__)
def test_a_start_in_the_middle_is_a_run_of_its_own(plugin: Plugin) -> None:
    """C28: steps count from 0, nothing is stored yet; the cached run is that of the shorter problem."""
    setup, noise = Setup("pixart", steps=10), Flow()
    outs, reports = [], []
    for cut in (True, False):
        with setup.applied(plugin, seeds=(0, 1)) as wraps, torch.inference_mode():
            guided = Guidance(1.0).wrap(setup.denoiser(wraps))
            run, rng = setup.run((0, 1)), SampleRng((0, 1))
            cond = {"cond": _tiny.conditioning((0, 1)), "uncond": _tiny.conditioning((9, 9))}
            times, x = torch.linspace(1, 0, 11, dtype=torch.float64), rng.normal((4, 8, 8))
            whole = Problem(x, times, guided, cond, DDIM().solver(noise, run), noise, rng, run)
            if cut:
                sampler = truncated(Start(lambda noise, t, rng, x=x: x, share=0.6))(march)
                outs.append(sampler(whole))
            else:
                outs.append(march(replace(whole, times=times[4:], run=replace(run, steps=6))))
        reports.append(wraps[0].report())
    assert torch.equal(*outs) and reports[0] == reports[1] and reports[0].did > 0


@pytest.mark.parametrize("plugin", [FORA(2), FirstBlock(1e9), TextKV()], ids=lambda p: type(p).__name__)
def test_a_time_that_comes_twice(plugin: Plugin) -> None:
    """C40: Heun's second evaluation of a step and the first of the next are at one time, and are kept apart.

    Against a run in which no time comes twice: the grid is the same, so what is computed and reused must be too.
    """
    setup = Setup("pixart", steps=6, solver="heun")
    seen: list[float] = []
    plain = setup.generate()
    solver = Heun().solver(Flow(), setup.run((0,)))
    assert solver.facts.evaluations == 2
    with setup.applied(plugin) as wraps:
        inner = setup.denoiser(wraps)

        class Watch:
            def denoise(self, x: Tensor, t: Tensor, cond: Any, call: Any) -> Tensor:
                seen.append(call.t)
                return inner.denoise(x, t, cond, call)

        rng = SampleRng((0,))
        cond = {"cond": _tiny.conditioning((0,)), "uncond": _tiny.conditioning((9,))}
        times = torch.linspace(1, 0, 7, dtype=torch.float64)
        problem = Problem(
            rng.normal((4, 8, 8)), times, Guidance(1.0).wrap(Watch()), cond, solver, Flow(), rng, setup.run((0,))
        )
        with torch.inference_mode():
            out = march(problem)
    again, report = setup.cached(plugin)
    assert len(seen) == 10 and len(set(seen)) < len(seen), "the test needs a time that comes twice"
    assert torch.equal(out, again) and report == wraps[0].report()
    if isinstance(plugin, TextKV):
        assert torch.equal(out, plain)
    elif isinstance(plugin, FORA):
        assert report.facts["misses"] == 9 * 6  # steps 0, 2, 4 first; 1 (nothing kept), 2, 4 second


#: Rows of the composition table that are about caches, or about what stands beside one, -> a chain, as
#: `hook word word`, and the rules that it meets.
ROWS: dict[str, tuple[list[str], list[str]]] = {
    "C1": (["cache denoiser-output step-reuse", "solver"], []),
    "C2": (["cache denoiser-output step-reuse", "solver multistep"], ["C2"]),
    "C3": (["cache denoiser-output step-reuse", "solver stochastic-step"], ["C3"]),
    "C4": (["cache block-outputs step-reuse", "run few-step"], ["C4"]),
    "C5": (["cache block-outputs step-reuse dynamic-decision", "run guided"], []),
    "C6": (["cache block-outputs step-reuse dynamic-decision", "parallelize branch-axis", "run guided"], ["C6"]),
    "C7": (["cache block-outputs step-reuse dynamic-decision", "parallelize patch-axis"], ["C7"]),
    "C8": (["cache block-outputs step-reuse", "parallelize pipeline-stages"], ["C8"]),
    "C9": (["parallelize patch-axis", "parallelize pipeline-stages"], ["C9"]),
    "C10": (["cache block-outputs step-reuse", "parallelize stale-activations"], ["C10"]),
    "C11": (["parallelize stale-activations", "run few-step"], ["C11"]),
    "C12": (["cache block-outputs step-reuse", "parallelize trajectory batch-axis"], ["C12"]),
    "C13": (["solver stochastic-step", "parallelize trajectory batch-axis"], ["C13"]),
    "C14": (["solver multistep", "parallelize trajectory batch-axis"], ["C14"]),
    "C15": (["parallelize branch-axis", "parallelize trajectory batch-axis", "run guided"], ["C15"]),
    "C16": (["cache block-outputs step-reuse", "compress low-bit"], []),
    "C25": (["cache block-outputs ends-guidance", "parallelize branch-axis", "run guided"], ["C25"]),
    "C26": (["cache block-outputs frozen-outputs", "cache block-outputs stage-outputs"], []),
    "C27": (["cache block-outputs step-reuse", "schedule optimised-grid"], ["C27"]),
    "C28": (["cache trajectory-store", "solver multistep"], ["C28"]),
    "C29": (["cache block-outputs step-reuse", "solver time-jumps"], ["C29"]),
    "C30": (["cache block-outputs step-reuse"], []),
    "C31": (["cache block-outputs stage-outputs step-reuse", "compress side-residuals"], ["C31"]),
    "C33": (["cache block-outputs step-reuse", "run distill"], ["C33"]),
    "C35": (["cache needs-tokens token-states", "solver"], []),
    "C36": (["cache block-outputs", "cache block-outputs"], ["C36"]),
    "C40": (["cache block-outputs step-reuse", "solver repeated-evaluations"], []),
}
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "caches-composition.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_composition_table(row: str) -> None:
    texts, expected = ROWS[row]
    chain = [Member(f"{i}", t.split()[0], frozenset(t.split()[1:])) for i, t in enumerate(texts)]
    assert [f.rule.id for f in check(chain)] == expected


def test_the_page_has_every_row() -> None:
    """Each with its rule or the reason why there is none, and a test that exists and speaks of it."""
    lines = {line.split("|")[1].strip(): line.split("|")[2:5] for line in PAGE.splitlines() if line.startswith("| C")}
    assert list(lines) == list(ROWS)
    verdicts = {rule.id: rule.verdict for rule in BOOK}
    for row, (_, verdict, where) in lines.items():
        said = verdict.strip()
        if row in ROWS[row][1]:
            expected = {"forbid": "forbids", "warn": "warns"}[verdicts[row]]
            assert said.startswith(expected) or expected in said, f"{row}: {said}"
        else:
            assert said.startswith(("no rule: ", "allowed: ")), f"{row}: {said}"
        assert (Path(__file__).resolve().parents[2] / where.strip().strip("`")).is_file()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("trajectory batch-axis", ["C12"]),  # parallel in time: Picard, ParaDiGMS
        ("trajectory", []),  # a start in the middle
        ("batch-axis", []),
    ],
)
def test_parallel_in_time_and_caches(words: str, found: list[str]) -> None:
    other = Member("parallel-in-time", "parallelize", frozenset(words.split()))
    for plugin in (FORA(), FirstBlock()):
        assert [f.rule.id for f in check([Member("it", "cache", plugin.effects), other])] == found
    assert check([Member("it", "cache", TextKV().effects), other]) == []
