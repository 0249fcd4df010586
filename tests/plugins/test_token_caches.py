"""Keys and values of masked text: exact where they must be, counted from below, rows apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.call import Call
from suite.diffusion.denoiser import Counter, Denoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.errors import ConfigError, RuleError
from suite.host.plan import make_plan
from suite.network import Layout, Network
from suite.plugin import Plugin, build
from suite.plugins.cache.dual_kv import DualKV
from suite.plugins.cache.prefix_kv import PrefixKV
from suite.plugins.cache.unchanged import Unchanged
from suite.plugins.solvers.block_refinement import BlockRefinement
from suite.plugins.solvers.mdlm import MDLM
from suite.plugins.solvers.threshold import Threshold
from suite.recipe import Recipe
from suite.rules import Member, check
from suite.testing.tiny import LENGTH, MASK, PROMPT, Tiny, TinyTokens, modernbert

BLOCK = 4
BOTH = pytest.mark.parametrize("cls", [PrefixKV, DualKV], ids=lambda c: c.called)
#: Largest difference of a probability that another order of a sum may make.
ROUNDING = 2e-6


@contextmanager
def applied(tiny: Tiny, plugin: Plugin | None, counter: Counter | None = None) -> Iterator[tuple[Denoiser, Any]]:
    """The denoiser with this plugin, and its wrap."""
    wrap = plugin.cache(tiny.network, tiny.run()) if plugin else None
    try:
        with torch.inference_mode():
            yield tiny.denoiser(wrap, counter), wrap
    finally:
        if wrap and wrap.undo:
            wrap.undo()
        assert not any("forward" in m.__dict__ for m in tiny.module.modules())


def ask(denoiser: Denoiser, tiny: Tiny, states: Sequence[Tensor], seeds: Sequence[int] = (0,)) -> list[Tensor]:
    """Answers to given tokens, one step each."""
    cond, time = tiny.cond(seeds)["cond"], torch.tensor(0.5, dtype=torch.float64)
    calls = [Call(k, len(states), 0.5, 0.4, run_id="ask") for k in range(len(states))]
    return [denoiser.denoise(x, time, cond, call) for x, call in zip(states, calls, strict=True)]


def filling(seeds: Sequence[int] = (0,)) -> list[Tensor]:
    """Tokens that become known one by one, in an order that is not that of the places but keeps to the blocks."""
    order = [2, 0, 3, 1, 5, 7, 4, 6]
    known = TinyTokens.build().state(seeds, LENGTH)
    states = []
    for count in range(LENGTH):
        x = torch.full_like(known, MASK)
        x[:, order[:count]] = known[:, order[:count]]
        states.append(x)
    return states


@contextmanager
def lengths(tiny: Tiny) -> Iterator[list[tuple[int, int]]]:
    """(rows, places) of each call of the first block, from below."""
    seen: list[tuple[int, int]] = []
    module: Any = tiny.module
    layer = module.model.layers[0].mlp
    plain = layer.forward

    def counted(x: Tensor) -> Tensor:
        seen.append((x.shape[0], x.shape[1]))
        return plain(x)

    layer.forward = counted
    try:
        yield seen
    finally:
        del layer.__dict__["forward"]


def sample(
    tiny: Tiny, solver: Plugin, plugin: Plugin | None, seeds: Sequence[int], steps: int = LENGTH, guidance: float = 1.0
) -> tuple[Tensor, Any, Counter]:
    """(tokens, report, counter) of one run with a solver of the suite."""
    counter, run, rng = Counter(), tiny.run(seeds, steps=steps, guidance=guidance), SampleRng(seeds)
    made: Any = solver.solver(tiny.noise, run)
    with applied(tiny, plugin, counter) as (denoiser, wrap):
        guided = Guidance(guidance, tokens=True).wrap(denoiser)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        out = march(Problem(tiny.prior(seeds), times, guided, tiny.cond(seeds), made, tiny.noise, rng, run))
        return out, wrap.report() if wrap else None, counter


# ---- what is exact -----------------------------------------------------------------------------


@BOTH
def test_refresh_at_each_step_is_the_plain_answer(cls: type[PrefixKV]) -> None:
    tiny, states = TinyTokens.build(), filling((0, 1))
    with applied(tiny, None) as (denoiser, _):
        plain = ask(denoiser, tiny, states, (0, 1))
    with applied(tiny, cls(BLOCK, refresh=1)) as (denoiser, wrap):
        assert all(torch.equal(a, b) for a, b in zip(ask(denoiser, tiny, states, (0, 1)), plain, strict=True))
        assert wrap.report().did == 0 and "refresh = 1" in wrap.report().reason


@BOTH
@pytest.mark.parametrize("refresh", [0, 3])
def test_exact_at_block_ends_and_at_refreshes(cls: type[PrefixKV], refresh: int) -> None:
    """C35: the first evaluation of a block is whole, and bit for bit the plain one; between, it is not."""
    tiny, states = TinyTokens.build(), filling()
    with applied(tiny, None) as (denoiser, _):
        plain = ask(denoiser, tiny, states)
    with applied(tiny, cls(BLOCK, refresh=refresh)) as (denoiser, wrap), lengths(tiny) as seen:
        got = ask(denoiser, tiny, states)
        report = wrap.report()
    whole = [0, 4] if refresh == 0 else [0, 3, 4, 7]
    places = PROMPT + LENGTH
    assert [k for k, (_, n) in enumerate(seen) if n == places] == whole
    assert [torch.equal(a, b) for a, b in zip(got, plain, strict=True)] == [k in whole for k in range(LENGTH)]
    assert (report.facts["misses"], report.facts["parts"]) == (len(whole), LENGTH - len(whole))
    # The first block of the prefix has all of the text behind it; only the prompt is kept.
    part = [BLOCK if cls is DualKV or k >= BLOCK else LENGTH for k in range(LENGTH)]
    assert [n for _, n in seen] == [places if k in whole else part[k] for k in range(LENGTH)]
    assert report.did == sum(places - n for _, n in seen)


@BOTH
def test_exact_in_one_layer(cls: type[PrefixKV]) -> None:
    """With one layer keys depend on their own token, so what is computed is the plain answer at every step."""
    for layers, exact in ((1, True), (2, False)):
        tiny, states = TinyTokens(modernbert(layers=layers)), filling((0, 1))
        with applied(tiny, None) as (denoiser, _):
            plain = ask(denoiser, tiny, states, (0, 1))
        with applied(tiny, cls(BLOCK)) as (denoiser, _):
            got = ask(denoiser, tiny, states, (0, 1))
        worst = max(
            float((a - b)[:, slice(BLOCK * (k // BLOCK), BLOCK * (k // BLOCK + 1))].abs().max())
            for k, (a, b) in enumerate(zip(got, plain, strict=True))
        )
        assert (worst <= ROUNDING) == exact, worst


@BOTH
def test_a_part_of_the_same_text_is_the_whole(cls: type[PrefixKV]) -> None:
    """Kept keys and values are the right ones, at their places: the same question again has the same answer."""
    tiny = TinyTokens.build()
    for x in filling((0, 1)):
        with applied(tiny, cls(BLOCK)) as (denoiser, wrap):
            first, again = ask(denoiser, tiny, [x, x], (0, 1))
            assert wrap.report().facts["parts"] == 2
        assert float((first - again).abs().max()) <= ROUNDING


@BOTH
def test_the_same_on_the_shipped_model(cls: type[PrefixKV]) -> None:
    """With its rotary positions, and prompts of different lengths whose padding is left out of attention."""
    recipe = Recipe.from_dict({"steps": 24, "schedule": "uniform", "solver": "threshold:block=8", "dtype": "fp32"})
    with Engine.from_recipe(recipe, modality="text") as engine:
        problem = engine.problem(["dog (noun)", "speech: peace, nations, freedom"], (0, 1), Counter())
        x = problem.x.clone()
        x[:, :13] = torch.randint(5, 8000, (2, 13), generator=torch.Generator().manual_seed(0))
        plugin = cls(8)
        wrap = plugin.cache(engine.network, problem.run)
        assert wrap.network and wrap.denoiser and wrap.undo
        wrap.network(engine.network.module)
        denoiser = wrap.denoiser(problem.denoiser.inner)
        with torch.inference_mode():
            call = Call(0, 2, 0.5, 0.4)
            first, again = (denoiser.denoise(x, torch.tensor(0.5), problem.cond["cond"], call) for _ in range(2))
        wrap.undo()
    assert wrap.report().facts["parts"] == 2
    assert float((first - again).abs().max()) < 1e-5
    # And not by chance: the answers are no constants.
    assert float((again[0, 13:] - again[1, 13:]).abs().max()) > 0.01


def test_places_outside_of_the_block_may_be_taken_back() -> None:
    """A token that is edited, or masked again, somewhere else: nothing that was kept is used."""
    tiny, x = TinyTokens.build(), filling()[6]
    edited, masked = x.clone(), x.clone()
    edited[0, 1], masked[0, 1] = 7 if x[0, 1] != 7 else 8, MASK
    for other in (edited, masked):
        with applied(tiny, None) as (denoiser, _):
            (plain,) = ask(denoiser, tiny, [other])
        with applied(tiny, DualKV(BLOCK)) as (denoiser, wrap):
            *_, got = ask(denoiser, tiny, [filling()[4], x, other])
            facts = wrap.report().facts
        assert torch.equal(got, plain) and (facts["misses"], facts["parts"]) == (2, 1)


# ---- rows and branches -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rows_decide_for_themselves(cls: type[PrefixKV], guidance: float) -> None:
    """Rows that are in different blocks at the same step: each is what it is alone."""
    tiny, solver = TinyTokens.build(), Threshold(0.5, temperature=0.7, block=BLOCK)
    seeds = (0, 1, 2, 3)
    both, report, counter = sample(tiny, solver, cls(BLOCK), seeds, guidance=guidance)
    alone = [sample(tiny, solver, cls(BLOCK), (seed,), guidance=guidance) for seed in seeds]
    assert torch.equal(both, torch.cat([x for x, _, _ in alone]))
    spent = [c.nfe for _, _, c in alone]
    assert len(set(spent)) > 1, "the rows should not be alike"
    for fact in ("misses", "parts"):
        assert report.facts[fact] == sum(r.facts[fact] for _, r, _ in alone)
    # Evaluations a sample: what finished rows are asked for costs nothing.
    assert counter.nfe == pytest.approx(sum(spent) / len(seeds))
    assert (both != MASK).all()


@BOTH
def test_branches_are_kept_apart(cls: type[PrefixKV]) -> None:
    """As one batch or as two calls: the same texts."""
    tiny, cond = TinyTokens.build(), TinyTokens.build().cond((0, 1))
    states, time = filling((0, 1)), torch.tensor(0.5, dtype=torch.float64)
    with applied(tiny, cls(BLOCK)) as (denoiser, _):
        joined = [
            Guidance(2.0, tokens=True).wrap(denoiser).denoise(x, time, cond, Call(k, 8, 0.5, 0.4))
            for k, x in enumerate(states)
        ]
    with applied(tiny, cls(BLOCK)) as (denoiser, _):
        guided = Guidance(2.0, batched=False, tokens=True).wrap(denoiser)
        apart = [guided.denoise(x, time, cond, Call(k, 8, 0.5, 0.4)) for k, x in enumerate(states)]
    assert all(float((a - b).abs().max()) < 1e-5 for a, b in zip(joined, apart, strict=True))


@BOTH
def test_a_branch_that_was_away(cls: type[PrefixKV]) -> None:
    """Guidance in an interval: when a branch comes back, its tokens have changed, and so it is asked as a whole."""
    tiny, states = TinyTokens.build(), filling()
    cond, time = tiny.cond((0,))["cond"], torch.tensor(0.5, dtype=torch.float64)
    with applied(tiny, cls(BLOCK)) as (denoiser, wrap):
        for k, x in enumerate(states):
            if not 2 <= k < 6:
                denoiser.denoise(x, time, cond, Call(k, 8, 0.5, 0.4))
        assert (wrap.report().facts["misses"], wrap.report().facts["parts"]) == (2, 2)


@BOTH
def test_a_batch_of_another_size(cls: type[PrefixKV]) -> None:
    tiny = TinyTokens.build()
    with applied(tiny, cls(BLOCK)) as (denoiser, wrap):
        ask(denoiser, tiny, filling((0,))[:2], (0,))
        (got,) = ask(denoiser, tiny, filling((0, 1))[2:3], (0, 1))
        assert wrap.report().facts["misses"] == 3
    with applied(tiny, None) as (denoiser, _):
        (plain,) = ask(denoiser, tiny, filling((0, 1))[2:3], (0, 1))
    assert torch.equal(got, plain)


@BOTH
def test_with_tokens_that_are_taken_back_by_the_solver(cls: type[PrefixKV]) -> None:
    """Block refinement masks tokens of a full block again and evaluates twice a step (C40): texts come out whole."""
    tiny, solver = TinyTokens.build(), BlockRefinement(BLOCK, threshold=0.6, edits=2, places=2, temperature=0.0)
    out, report, _ = sample(tiny, solver, cls(BLOCK), (0, 1, 2))
    alone = [sample(tiny, solver, cls(BLOCK), (seed,))[0] for seed in (0, 1, 2)]
    assert torch.equal(out, torch.cat(alone)) and (out != MASK).all() and report.did > 0


# ---- unchanged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_unchanged_is_exact_and_costs_a_token_at_most(steps: int, guidance: float) -> None:
    tiny, branches = TinyTokens.build(), 1 if guidance == 1 else 2
    plain, _, before = sample(tiny, MDLM(), None, (0,), steps, guidance)
    out, report, after = sample(tiny, MDLM(), Unchanged(), (0,), steps, guidance)
    assert torch.equal(out, plain)
    assert before.nfe == steps * branches and after.nfe <= min(steps, LENGTH + 1) * branches
    assert report.did == before.nfe - after.nfe and (steps == 8 or report.did > 0)


def test_unchanged_leaves_rows_out() -> None:
    tiny = TinyTokens.build()
    plain, _, _ = sample(tiny, MDLM(), None, (0, 1, 2), 40)
    out, report, counter = sample(tiny, MDLM(), Unchanged(), (0, 1, 2), 40)
    alone = [sample(tiny, MDLM(), Unchanged(), (seed,), 40) for seed in (0, 1, 2)]
    assert torch.equal(out, plain)
    assert report.did == sum(r.did for _, r, _ in alone)
    assert counter.nfe == pytest.approx(sum(c.nfe for _, _, c in alone) / 3)


def test_unchanged_asks_again_for_another_prompt() -> None:
    tiny, time, x = TinyTokens.build(), torch.tensor(0.5), filling()[3]
    with applied(tiny, None) as (denoiser, _):
        plain = [denoiser.denoise(x, time, tiny.cond((s,))["cond"], Call(0, 2, 0.5, 0.4)) for s in (0, 1)]
    with applied(tiny, Unchanged()) as (denoiser, wrap):
        got = [denoiser.denoise(x, time, tiny.cond((s,))["cond"], Call(0, 2, 0.5, 0.4)) for s in (0, 1)]
        assert wrap.report().did == 0 and "every row changed" in wrap.report().reason
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)) and not torch.equal(*got)


def test_the_shipped_model_is_timeless() -> None:
    """What its modality declares is so: the answer is the same at every time."""
    with Engine.from_recipe(modality="text", recipe={"dtype": "fp32", "steps": 8}) as engine:
        assert engine.network.timeless
        problem = engine.problem(["dog (noun)"], (0,), Counter())
        with torch.inference_mode():
            early, late = (
                problem.denoiser.denoise(
                    problem.x, torch.tensor(t, dtype=torch.float64), problem.cond, Call(0, 1, t, 0)
                )
                for t in (1.0, 0.3)
            )
    assert torch.equal(early, late)


# ---- refusals and limits -----------------------------------------------------------------------


def test_bad_options() -> None:
    for options, message in [
        ({"block": "0"}, "dual-kv: block = 0: expected at least 1 place"),
        ({"refresh": "-1"}, "dual-kv: refresh = -1: expected evaluations, or 0"),
        ({"limit_mib": "0"}, "dual-kv: limit_mib = 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(DualKV, options, name="dual-kv")


@BOTH
@pytest.mark.parametrize(
    ("solver", "said"),
    [
        ("mdlm", "the solver mdlm fills places anywhere"),
        ("threshold", "the solver threshold fills places anywhere"),
        ("threshold:block=16", "the solver threshold has block = 16"),
    ],
)
def test_the_solver_must_fill_the_same_blocks(cls: type[PrefixKV], solver: str, said: str) -> None:
    recipe = {"solver": solver, "cache": [cls.called]}
    with pytest.raises(ConfigError, match=rf"{cls.called}: block = 8, but {said}; .* --solver threshold:block=8"):
        make_plan("text", recipe)
    make_plan("text", {**recipe, "solver": "confidence:block=8"})


@pytest.mark.parametrize("name", ["prefix-kv", "dual-kv", "unchanged"])
def test_pictures_are_refused_by_a_rule(name: str) -> None:
    with pytest.raises(RuleError, match=rf"{name} with this run \(real-vectors\): it goes by which tokens .*rule T1"):
        make_plan("image", {"cache": [name]})


@BOTH
def test_networks_that_cannot_be_asked_for_parts(cls: type[PrefixKV]) -> None:
    tiny = TinyTokens.build()
    with pytest.raises(ConfigError, match=r"asks the network for some of its tokens.*Layout.parts.*ModernBert"):
        cls().cache(Network(tiny.module, Layout((LENGTH,))), tiny.run())
    with pytest.raises(ConfigError, match=r"looked for attention, but Linear has no part of any known kind"):
        cls().cache(Network(torch.nn.Linear(1, 1), Layout((LENGTH,), parts=True)), tiny.run())
    with pytest.raises(ConfigError, match=r"unchanged reuses answers at other times, but ModernBert"):
        Unchanged().cache(replace(tiny.network, timeless=False), tiny.run())


@BOTH
def test_attention_of_another_kind_is_refused(cls: type[PrefixKV]) -> None:
    tiny = TinyTokens.build().copy()
    module: Any = tiny.module
    module.config._attn_implementation = "eager"
    with applied(tiny, cls(BLOCK)) as (denoiser, _):
        with pytest.raises(ConfigError, match=r"model.layers.0.attn called scaled_dot_product_attention 0 times"):
            ask(denoiser, tiny, filling())


@BOTH
def test_memory_is_counted_and_bounded(cls: type[PrefixKV]) -> None:
    tiny, states = TinyTokens.build(), filling((0, 1))
    with applied(tiny, cls(BLOCK)) as (denoiser, wrap):
        ask(denoiser, tiny, states, (0, 1))
        keys, answers = 2 * 2 * (PROMPT + LENGTH) * 32 * 4, LENGTH * (12 * 4 + 8)
        assert wrap.report().facts["bytes_held"] == 2 * (keys + answers)
    with applied(tiny, cls(BLOCK, limit_mib=0.001)) as (denoiser, _):
        with pytest.raises(ConfigError, match=rf"{cls.called} holds .* MiB of keys.* limit_mib = 0.001; raise it"):
            ask(denoiser, tiny, states, (0, 1))


def test_rules_for_text_caches() -> None:
    """C35 in words: parallel unmasking may go with kept keys, step caches may not stand beside them unnoticed."""
    chain = [
        Member("dual-kv", "cache", DualKV().effects),
        Member("threshold", "solver", Threshold(block=8).effects),
    ]
    assert check(chain) == []
    # Rows of two branches are asked for apart from each other, which ranks that hold one branch each cannot follow.
    for plugin in (DualKV(), PrefixKV(), Unchanged()):
        chain = [Member("it", "cache", plugin.effects), Member("cfg", "parallelize", frozenset({"branch-axis"}))]
        assert [f.rule.id for f in check(chain)] == ["C6"]


def test_one_run_from_the_command_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    suite = [sys.executable, "-m", "suite.cli", "text", "dog (noun)", "--steps", "24", "--dtype", "fp32"]
    cached = [
        *suite,
        "--solver",
        "threshold:block=8,threshold=0.7",
        "--cache",
        "dual-kv",
        "-o",
        str(tmp_path / "a.txt"),
    ]
    done = subprocess.run(cached, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run([*suite, "--cache", "dual-kv"], capture_output=True, text=True)
    assert refused.returncode == 2 and "fills places anywhere" in refused.stderr
