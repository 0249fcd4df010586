"""Block caching and learned routers: the rules replayed offline, closed-form fits, training, and what is counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.fitting.cache_file import CacheFile
from suite.fitting.cache_fit import patched
from suite.fitting.stamp import RunStamp
from suite.plugin import Plugin, build
from suite.plugins.cache.block_cache import BlockCache, decoded, encoded, reuse
from suite.plugins.cache.calibrate.block_cache import BlockCache as BlockCacheMethod
from suite.plugins.cache.calibrate.block_cache import Changes, Moments
from suite.plugins.cache.calibrate.learned import Learned as LearnedMethod
from suite.plugins.cache.calibrate.learned import Mixing, mixed, pairs_of
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.learned import Learned, routed
from suite.rules import Member, check
from suite.testing import Tiny
from suite.testing.calibrating import TinyProblem, calibrated
from suite.testing.oracles import a_run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import CASES, Setup

NETWORKS = list(CASES)
KINDS = ("attention", "cross_attention", "mlp")
ROUNDING = 2e-5


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= ROUNDING


def written(folder: Path, method: str, setup: Setup, row: Any, **values: Any) -> str:
    """A calibration of eight even steps; `row` gives the numbers of a part from its place in the network."""
    stamp = RunStamp("m", "n", "ddim", 8, "uniform", "")
    times = tuple(torch.linspace(1, 0, 9, dtype=torch.float64).tolist())
    parts = [ref.name for ref in setup.network.blocks(*KINDS)]
    key = {"block-cache": "changes", "learned": "beta"}[method]
    tables = {name: [row(k), row(k)] for k, name in enumerate(parts)}
    path = folder / f"{method}-{setup.name}.json"
    cache_file.write(path, CacheFile(method, stamp, times, {key: tables, **values}))
    return str(path)


def changing(place: int) -> list[float | None]:
    """Parts in turn change by much and by little."""
    return [None, *[(0.15, 0.4)[place % 2]] * 7]


def routers(place: int) -> list[float | None]:
    return [None, (0.2, 0.9)[place % 2]] * 4


def acting(method: str, setup: Setup, folder: Path) -> Plugin:
    if method == "block-cache":
        return BlockCache(written(folder, method, setup, changing, threshold=0.5))
    return Learned(written(folder, method, setup, routers))


both = pytest.mark.parametrize("method", ["block-cache", "learned"])
networks = pytest.mark.parametrize("name", NETWORKS)

# ---- rules -----------------------------------------------------------------------------------------


def test_the_cumulative_rule() -> None:
    assert reuse([None, 0.2, 0.2, 0.2, 0.05, 0.3], 0.5) == [False, True, True, False, True, True]
    assert reuse([None, 0.2, 0.2, 0.2], 0.2) == [False] * 4
    assert reuse([None, 0.0, 0.0], 0.0) == [False] * 3
    assert reuse([None, 0.1, None, 0.1], 1.0) == [False, True, False, True]


def test_routers_below_the_threshold_reuse() -> None:
    assert routed([None, 0.3, None, 0.7], 0.5) == [False, True, False, False]
    assert not any(routed([None, 0.0, None, 0.0], 0.0))


def test_words_of_the_rules() -> None:
    """They decide before the run, so they may be combined with ranks (C6, C7) and not with another cache (C36)."""
    for plugin in (BlockCache("f"), Learned("f")):
        chain = [Member("it", "cache", plugin.effects), Member("other", "parallelize", frozenset({"patch-axis"}))]
        assert check(chain) == []
        chain = [Member("it", "cache", plugin.effects), Member("other", "cache", FORA().effects)]
        assert [f.rule.id for f in check(chain)] == ["C36"]


# ---- on networks -------------------------------------------------------------------------------------


@both
@networks
def test_parts_run_as_planned(method: str, name: str, tmp_path: Path) -> None:
    setup = Setup(name, steps=8)
    plugin = acting(method, setup, tmp_path)
    with _tiny.counting(setup.network, *KINDS) as seen:
        out, report = setup.cached(plugin, (0, 1))
    # Changes of 0.15: computed at 0 and 4; of 0.4: at 0, 2, 4, 6. Routers of 0.9 are above the threshold.
    expected = {"block-cache": (2, 4), "learned": (4, 8)}[method]
    assert list(seen.calls.values()) == [expected[k % 2] for k in range(len(seen.calls))]
    assert report.did == 8 * len(seen.calls) - sum(seen.calls.values()) and report.facts["bytes_held"] > 0
    assert not torch.equal(out, setup.generate((0, 1)))


@both
@networks
def test_off_is_bit_identical(method: str, name: str, tmp_path: Path) -> None:
    setup = Setup(name, steps=8, guidance=3.0)
    plain = setup.generate((0, 1))
    if method == "block-cache":
        file = written(tmp_path, method, setup, changing, threshold=0.5)
        off = [BlockCache(file, 0.0), BlockCache(file, 0.1)]
    else:
        off = [Learned(written(tmp_path, method, setup, routers), 0.0)]
        off += [Learned(written(tmp_path, method, setup, lambda place: [None, 1.0] * 4), 1.0)]
    for plugin in off:
        out, report = setup.cached(plugin, (0, 1))
        assert torch.equal(out, plain) and report.did == 0 and report.reason
    assert off[0].lossless and not off[1].lossless


@networks
def test_routers_at_zero_are_fora(name: str, tmp_path: Path) -> None:
    setup = Setup(name, steps=8, guidance=3.0)
    plugin = Learned(written(tmp_path, "learned", setup, lambda place: [None, 0.0] * 4))
    assert torch.equal(setup.cached(plugin, (0, 1))[0], setup.cached(FORA(2), (0, 1))[0])


@networks
def test_scale_one_and_shift_zero_is_plain_reuse(name: str, tmp_path: Path) -> None:
    setup = Setup(name, steps=8)
    widths = widths_of(setup)
    plain = BlockCache(written(tmp_path, "block-cache", setup, changing, threshold=0.5))
    expected, _ = setup.cached(plain, (0, 1))
    for scale, same in ((1.0, True), (0.5, False)):
        texts = {
            part: {f"0/{s}": encoded([([scale] * w, [0.0] * w) for w in each]) for s in range(8)}
            for part, each in widths.items()
        }
        file = written(tmp_path, "block-cache", setup, changing, threshold=0.5, adjust=texts)
        out, report = setup.cached(BlockCache(file), (0, 1))
        assert torch.equal(out, expected) is same and report.facts["adjusted"]
        assert torch.equal(setup.cached(BlockCache(file, adjust=False), (0, 1))[0], expected)
        with pytest.raises(ConfigError, match=r"fitted to threshold = 0.5, not 0.4; write adjust=false, or calibrate"):
            BlockCache(file, 0.4).cache(setup.network, a_run(steps=8))


def widths_of(setup: Setup) -> dict[str, list[int]]:
    """Channels of every tensor that a part gives."""
    widths: dict[str, list[int]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            widths[name] = [t.shape[-1] for t in (output if isinstance(output, tuple) else (output,)) if t is not None]

        return hook

    hooks = [ref.module.register_forward_hook(note(ref.name)) for ref in setup.network.blocks(*KINDS)]
    setup.generate()
    for hook in hooks:
        hook.remove()
    return widths


@both
@networks
def test_runs_rows_branches_and_undo(method: str, name: str, tmp_path: Path) -> None:
    setup = Setup(name, steps=8, guidance=3.0)
    plugin, plain = acting(method, setup, tmp_path), setup.generate((3, 4))
    one, two = (setup.cached(plugin, (3, 4)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1] and not torch.equal(one[0], plain)
    assert close(one[0], torch.cat([setup.cached(plugin, (seed,))[0] for seed in (3, 4)]))
    apart, other = Setup(name, steps=8, guidance=3.0, batched=False).cached(plugin, (3, 4))
    assert close(one[0], apart) and other.did == 2 * one[1].did
    assert not any("forward" in m.__dict__ for m in setup.module.modules())
    assert torch.equal(setup.generate((3, 4)), plain)


@both
def test_uncond_does_not_reach_cond(method: str, tmp_path: Path) -> None:
    setup = Setup("pixart", steps=8)
    plugin = acting(method, setup, tmp_path)
    start, way = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    path = [start + 0.1 * step * way for step in range(8)]
    cond = {"cond": _tiny.conditioning((1, 2)), "uncond": _tiny.conditioning((8, 9))}
    (alone,), _ = setup.script(plugin, path, ["cond"], **cond)
    for order in (["cond", "uncond"], ["uncond", "cond"]):
        answers, _ = setup.script(plugin, path, order, **cond)
        assert all(torch.equal(a, b) for a, b in zip(alone, answers[order.index("cond")], strict=True))


@both
def test_two_evaluations_and_guidance_in_an_interval(method: str, tmp_path: Path) -> None:
    """Only what the plan means is reused: a branch or an evaluation that was missing there is computed."""
    setup = Setup("pixart", steps=8, solver="heun")
    plugin = acting(method, setup, tmp_path)
    with _tiny.counting(setup.network, "attention") as seen:
        setup.cached(plugin)
    # First evaluations as before; the second is missing at the first and at the last step.
    first = "transformer_blocks.0.attn1"
    assert seen.calls[first] == {"block-cache": 2 + 4, "learned": 4 + 4}[method]
    setup = Setup("pixart", steps=8, guidance=3.0, interval=(0.3, 0.7))  # c c c j j j c c
    with _tiny.counting(setup.network, "attention") as seen:
        out, _ = setup.cached(plugin)
    assert seen.calls[first] == {"block-cache": 5, "learned": 5}[method] and out.isfinite().all()


@both
def test_no_error_where_nothing_changes(method: str, tmp_path: Path) -> None:
    setup = Setup("pixart", steps=8, guidance=3.0)
    plain = setup.generate((0, 1), blind=True)
    out, report = setup.cached(acting(method, setup, tmp_path), (0, 1), blind=True)
    assert torch.equal(out, plain) and report.did > 0


# ---- calibrating block caching -------------------------------------------------------------------------


def test_scales_and_shifts_are_the_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(2, 50, 3, generator=generator)
    plain = kept * torch.tensor([0.5, 2.0, -1.0]) + torch.tensor([0.1, 0.0, 3.0])
    moments = Moments(torch.zeros(5, 3, dtype=torch.float64))
    moments.add(kept, plain)
    scale, shift = moments.affine()
    assert scale == pytest.approx([0.5, 2.0, -1.0], abs=1e-5) and shift == pytest.approx([0.1, 0.0, 3.0], abs=1e-5)
    noisy = plain + 0.3 * torch.randn(plain.shape, generator=generator)
    moments = Moments(torch.zeros(5, 3, dtype=torch.float64))
    for half in (0, 1):
        moments.add(kept[half : half + 1], noisy[half : half + 1])
    fitted = moments.affine()
    design = torch.stack([kept[..., 1].flatten(), torch.ones(100)], 1).double()
    exact = torch.linalg.lstsq(design, noisy[..., 1].flatten().double()).solution
    assert (fitted[0][1], fitted[1][1]) == pytest.approx(tuple(exact.tolist()))
    reused, adjusted, size = moments.errors(fitted)
    away = kept * torch.tensor(fitted[0]) + torch.tensor(fitted[1]) - noisy
    assert adjusted == pytest.approx(float(away.square().sum()), rel=1e-4)
    assert reused == pytest.approx(float((kept - noisy).square().sum()), rel=1e-4)
    assert size == pytest.approx(float(noisy.square().sum()), rel=1e-5) and adjusted < reused
    constant = Moments(torch.zeros(5, 1, dtype=torch.float64))
    constant.add(torch.full((4, 2, 1), 2.0), torch.full((4, 2, 1), 3.0))
    assert constant.affine() == ([1.0], [1.0])


def test_scales_are_written_and_read() -> None:
    affines = [([0.5, 1.25], [0.0, -2.0]), ([1.0], [0.25])]
    assert decoded(encoded(affines)) == affines
    for text in (None, "x", 3):
        with pytest.raises(ConfigError, match="cannot be read"):
            decoded(text)


def test_block_cache_calibrates_what_it_reads() -> None:
    """The plan of the file is the rule replayed on its changes, and adjusting is nearer on held-out samples."""
    problem = TinyProblem(samples=3, checks=2)
    content = calibrated("block-cache", BlockCacheMethod(0.2), problem)
    facts = content.made
    assert facts["error_adjusted"] < facts["error_reused"] and 0 < facts["reused_share"] < 1
    flags = [again for rows in content.values["changes"].values() for row in rows for again in reuse(row, 0.2)]
    assert facts["reused_share"] == sum(flags) / len(flags)
    changes = Changes(problem.network)
    outputs: dict[int, Tensor] = {}
    part = problem.network.blocks("mlp")[1]
    problem.sample("", changes.install)
    seen = []
    hook = part.module.register_forward_hook(lambda m, a, out: seen.append(out))
    problem.sample("")
    hook.remove()
    for step in (1, 7):
        change = ((seen[step] - seen[step - 1]).abs().flatten(1).sum(1) / seen[step].abs().flatten(1).sum(1)).mean()
        assert content.values["changes"][part.name][0][step] == pytest.approx(float(change), rel=1e-3)
    assert not outputs and content.values["changes"][part.name][0][0] is None
    with pytest.raises(ConfigError, match=r"no part changes less than threshold = 1e-09"):
        BlockCacheMethod(1e-9).fit(problem)
    small = calibrated("block-cache", BlockCacheMethod(0.2, adjust=False), problem)
    assert "adjust" not in small.values


# ---- training routers --------------------------------------------------------------------------------


def test_mixing_at_one_and_zero_is_exact() -> None:
    full, cached = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(mixed(1.0, full, cached), full) and torch.equal(mixed(0.0, full, cached), cached)
    assert torch.allclose(mixed(0.25, full, cached), 0.25 * full + 0.75 * cached)
    assert mixed(1.0, (full, None), (cached, None))[1] is None


def test_routers_at_one_answer_as_the_plain_network() -> None:
    problem = TinyProblem(samples=1, checks=1)
    (records,) = problem.records("")
    pairs = pairs_of(records)
    assert [now.call.step for _, now in pairs] == [1, 3, 5, 7, 9]
    assert all(before.call.step == now.call.step - 1 for before, now in pairs)
    before, now = pairs[2]
    plain = problem.answer(now)
    mixing = Mixing(problem.network, lambda name, e, s: 1.0)
    with patched(mixing.install):
        problem.answer(before)
        mixing.keeping = False
        assert torch.equal(problem.answer(now), plain)
        mixing.beta = lambda name, e, s: 0.0
        assert not torch.equal(problem.answer(now), plain)


def test_training_separates_parts_that_matter() -> None:
    """A part whose output is scaled up, so that reusing it is wrong by much, keeps a higher router than the others."""
    tiny = Tiny.build()
    loud = tiny.network.blocks("mlp")[3]
    with torch.no_grad():
        for weight in loud.module.parameters():
            weight.mul_(6)
    content = calibrated("learned", LearnedMethod(penalty=1e-5, epochs=6, rate=0.5), TinyProblem(tiny, 2, 1))
    beta = content.values["beta"]
    odd = {name: [b for b in rows[0] if b is not None] for name, rows in beta.items()}
    assert {len(v) for v in odd.values()} == {5} and all(0 <= b <= 1 for v in odd.values() for b in v)
    means = {name: sum(v) / 5 for name, v in odd.items()}
    assert means[loud.name] > max(m for name, m in means.items() if name != loud.name)
    facts = content.made
    assert facts["error_routed"] <= facts["error_all_reused"] and 0 <= facts["reused_share"] <= 5 / 11
    assert all(p.grad is None and not p.requires_grad for p in tiny.module.parameters())


#: What `configs/calibrations` holds for the conformance kit, and how it was made.
KIT = {
    "block-cache": BlockCacheMethod(threshold=0.2),
    "learned": LearnedMethod(penalty=1e-6, epochs=6, rate=1.0),
}


@pytest.mark.parametrize("name", KIT)
def test_the_kits_calibrations_are_current(name: str) -> None:
    made, kept = calibrated(name, KIT[name]), cache_file.read(cache_file.shipped()[f"{name}-tiny-11"], name)
    assert kept.stamp == made.stamp and kept.times == pytest.approx(made.times)
    key = {"block-cache": "changes", "learned": "beta"}[name]
    assert kept.values[key].keys() == made.values[key].keys()
    for part, rows in made.values[key].items():
        values = zip(rows[0], kept.values[key][part][0], strict=True)
        assert all((a is None) == (b is None) and abs((a or 0) - (b or 0)) < 0.05 for a, b in values)


# ---- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BlockCache, {"threshold": "-1"}, r"block-cache: threshold = -1.0: expected 0 or more"),
        (Learned, {"threshold": "1.5"}, r"learned: threshold = 1.5: expected 0 to 1"),
        (BlockCacheMethod, {"threshold": "0"}, r"threshold = 0.0: expected more than 0"),
        (LearnedMethod, {"penalty": "0"}, r"penalty = 0.0: expected more than 0"),
        (LearnedMethod, {"rate": "-1"}, r"rate = -1.0"),
        (LearnedMethod, {"epochs": "0"}, r"epochs = 0: expected at least 1"),
    ],
)
def test_bad_options(cls: type, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


def test_bad_files(tmp_path: Path) -> None:
    setup = Setup("pixart", steps=8)
    other = written(tmp_path, "block-cache", Setup("dit", steps=8), changing, threshold=0.5)
    with pytest.raises(ConfigError, match=r"network with other parts: transformer_blocks.0.attn2"):
        BlockCache(other).cache(setup.network, a_run(steps=8))
    with pytest.raises(ConfigError, match="expected a number `threshold`"):
        BlockCache(written(tmp_path, "block-cache", setup, changing)).cache(setup.network, a_run(steps=8))
    with pytest.raises(ConfigError, match="beta must give 8 numbers"):
        Learned(written(tmp_path, "learned", setup, lambda place: [0.1])).cache(setup.network, a_run(steps=8))
    text = {name: {"0/1": encoded([([1.0], [0.0])])} for name in widths_of(setup)}
    file = written(tmp_path, "block-cache", setup, changing, threshold=0.5, adjust=text)
    with pytest.raises(ConfigError, match=r"has other channels than its calibration"):
        setup.cached(BlockCache(file))
