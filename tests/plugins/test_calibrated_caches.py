"""TeaCache and MagCache: rules replayed by hand, rows apart, and calibrations that fit their run or are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.fitting.cache_file import CacheFile
from suite.fitting.stamp import RunStamp
from suite.plugin import Plugin, build
from suite.plugins.cache.calibrate.magcache import MagCache as MagCacheMethod
from suite.plugins.cache.calibrate.teacache import TeaCache as TeaCacheMethod
from suite.plugins.cache.calibrate.teacache import determination
from suite.plugins.cache.magcache import MagCache, skips
from suite.plugins.cache.teacache import Rescaling, TeaCache
from suite.rules import Member, check
from suite.testing import Tiny
from suite.testing.calibrating import TinyProblem, calibrated
from suite.testing.oracles import a_run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import CASES, Setup

CHAINS = [*(name for name in CASES if name != "unet"), "latte"]
ROUNDING = 2e-5
#: Ratios of eight steps at which MagCache, with the options below, skips 2, 3, 5 and 6 and computes 4 and 7.
RATIOS = [[1.0, 0.9, 1.02, 0.99, 0.7, 1.0, 1.01, 0.6]]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Calibrations of eight even steps: TeaCache's is the identity."""
    stamp = RunStamp("m", "n", "ddim", 8, "uniform", "")
    times = tuple(torch.linspace(1, 0, 9, dtype=torch.float64).tolist())
    values = {
        "teacache": {"coefficients": [0.0, 1.0], "range": [0.0, 100.0]},
        "magcache": {"ratios": [*RATIOS, [None, *RATIOS[0][1:7], None]]},
    }
    out = {}
    for name, value in values.items():
        out[name] = str(tmp_path / f"{name}.json")
        cache_file.write(Path(out[name]), CacheFile(name, stamp, times, value, {"r2": 0.9}))
    return out


def acting(name: str, network: str, files: dict[str, str]) -> Plugin:
    if name == "teacache":
        return TeaCache({"wan": 0.3, "stable-audio": 0.6}.get(network, 0.9), files[name])
    return MagCache(0.06, files[name], retention=0.25)


both = pytest.mark.parametrize("cache", ["teacache", "magcache"])
networks = pytest.mark.parametrize("name", CHAINS)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= ROUNDING


# ---- the rules by hand ---------------------------------------------------------------------------


def test_magcache_follows_the_product_and_adds_its_distances() -> None:
    errors = skips(RATIOS[0], 0.06, 3, 2)
    assert [k for k, e in enumerate(errors) if e is not None] == [2, 3, 5, 6]
    assert [errors[k] for k in (2, 3, 5, 6)] == pytest.approx([0.02, 0.02 + abs(1 - 1.02 * 0.99), 0.0, 0.01])
    assert skips([1.0] * 6, 0.1, 2, 1) == [None, 0.0, 0.0, None, 0.0, 0.0]
    assert skips([1.0] * 6, 0.1, 9, 4) == [None] * 4 + [0.0, 0.0]
    assert skips([1.0] * 4, 0.0, 9, 0) == [None, 0.0, 0.0, 0.0]  # equal magnitudes err by nothing
    assert skips([1.0, None, 1.0, 1.0], 0.1, 9, 0) == [None, None, None, 0.0]  # nothing to reuse after a gap


def test_the_polynomial_says_nothing_beyond_its_range() -> None:
    rescale = Rescaling((0.1, 0.0, 2.0), 0.2, 0.5)
    assert rescale(0.3) == pytest.approx(0.1 + 2 * 0.09)
    assert rescale(9.0) == rescale(0.5) and rescale(0.0) == rescale(0.2)
    assert Rescaling((-1.0,), 0, 1)(0.5) == 0.0


def test_determination() -> None:
    assert determination([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert determination([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0


def test_teacache_accumulates_a_row_at_a_time(files: dict[str, str]) -> None:
    """What it decides is replayed from the changes of its signal, which the test takes from a plain run."""
    setup, seeds, threshold = Setup("pixart"), (0, 1, 2), 0.3
    attention = setup.network.blocks("attention")[0].module
    with _tiny.counting(setup.network, "block") as seen:
        _, report = setup.cached(TeaCache(threshold, files["teacache"]), seeds)
    signals: list[Tensor] = []
    with setup.applied(TeaCache(threshold, files["teacache"]), seeds=seeds) as wraps:
        inner = attention.forward

        def probe(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if hidden_states.shape[0] == 3:
                signals.append(hidden_states.clone())
            return inner(hidden_states, *args, **kwargs)

        attention.forward = probe
        setup.generate(seeds, wraps)
        attention.forward = inner
    expected, sums, before = [], [0.0] * 3, None
    # Where all rows are computed the attention is asked twice with the same input: once to be caught, once to run.
    distinct = [s for k, s in enumerate(signals) if k == 0 or not torch.equal(s, signals[k - 1])]
    assert len(distinct) == 8
    for step, now in enumerate(distinct):
        hits = 0
        for row in range(3):
            if before is not None:
                change = float((now[row] - before[row]).abs().mean() / before[row].abs().mean())
                sums[row] += change
            if step == 0 or sums[row] >= threshold:
                sums[row] = 0.0
            else:
                hits += 1
        expected.append(hits)
        before = now
    assert report.facts["hits_by_step"] == expected and 0 < sum(expected) < 21
    rows = {seen.rows[ref.name] for ref in setup.network.blocks("block")[1:]}
    assert rows == {24 - sum(expected)}


# ---- on networks -----------------------------------------------------------------------------------


@both
@networks
def test_off_is_bit_identical(cache: str, name: str, files: dict[str, str]) -> None:
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1))
    cls = {"teacache": TeaCache, "magcache": MagCache}[cache]
    off = [cls(0.0, files[cache])]
    off += [TeaCache(1e-9, files[cache])] if cache == "teacache" else [MagCache(1.0, files[cache], retention=1.0)]
    for plugin in off:
        out, report = setup.cached(plugin, (0, 1))
        assert torch.equal(out, plain) and report.did == 0 and report.reason
    assert off[0].lossless and not off[1].lossless


@both
@networks
def test_runs_rows_branches_and_undo(cache: str, name: str, files: dict[str, str]) -> None:
    setup, plugin = Setup(name, guidance=3.0), acting(cache, name, files)
    plain = setup.generate((3, 4))
    one, two = (setup.cached(plugin, (3, 4)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    facts = one[1].facts
    assert 0 < facts["skipped_share"] < 1 and facts["bytes_held"] > 0 and facts["error_estimate"] is not None
    assert not torch.equal(one[0], plain)
    alone = [setup.cached(plugin, (seed,)) for seed in (3, 4)]
    assert close(one[0], torch.cat([x for x, _ in alone]))
    assert facts["hits_by_step"] == [a + b for a, b in zip(*(r.facts["hits_by_step"] for _, r in alone), strict=True)]
    apart, other = Setup(name, guidance=3.0, batched=False).cached(plugin, (3, 4))
    assert close(one[0], apart) and other.facts["hits_by_step"] == facts["hits_by_step"]
    assert not any("forward" in m.__dict__ for m in setup.module.modules())
    assert torch.equal(setup.generate((3, 4)), plain)


@networks
def test_magcache_skips_whole_steps(name: str, files: dict[str, str]) -> None:
    setup = Setup(name)
    with _tiny.counting(setup.network, "block") as seen:
        _, report = setup.cached(MagCache(0.06, files["magcache"], retention=0.25), (0, 1))
    assert report.facts["hits_by_step"] == [0, 0, 2, 2, 0, 2, 2, 0]
    if name == "latte":  # the last block would end the chain in another shape than it began
        assert seen.calls.pop("temporal_transformer_blocks.2") == 8
    assert set(seen.calls.values()) == {4} and report.did == 8 * len(seen.calls)


@both
def test_uncond_does_not_reach_cond(cache: str, files: dict[str, str]) -> None:
    setup, plugin = Setup("pixart"), acting(cache, "pixart", files)
    generator = torch.Generator().manual_seed(0)
    start, way = torch.randn(2, 2, 4, 8, 8, generator=generator)
    path = [start + 0.1 * step * way for step in range(8)]
    cond = {"cond": _tiny.conditioning((1, 2)), "uncond": _tiny.conditioning((8, 9))}
    (alone,), _ = setup.script(plugin, path, ["cond"], **cond)
    for order in (["cond", "uncond"], ["uncond", "cond"]):
        answers, (report,) = setup.script(plugin, path, order, **cond)
        assert all(torch.equal(a, b) for a, b in zip(alone, answers[order.index("cond")], strict=True))
        assert report.did > 0


def test_teacache_rows_decide_apart(files: dict[str, str]) -> None:
    """Of two rows, one that stands still and one that jumps, only the first is reused, and both are right."""
    setup, cond = Setup("pixart", clock=0.0), _tiny.conditioning((1, 1))
    start, jump = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    path = [torch.cat([start, start if step < 2 else jump * (-1) ** step]) for step in range(8)]
    plugin = TeaCache(0.05, files["teacache"])
    (both_rows,), (report,) = setup.script(plugin, path, ["cond"], cond=cond)
    one = {k: v[:1] for k, v in cond.items()}
    singles = [setup.script(plugin, [x[i : i + 1] for x in path], ["cond"], cond=one) for i in (0, 1)]
    for step in range(8):
        assert close(both_rows[step], torch.cat([answers[0][step] for answers, _ in singles]))
    hits = [r[0].facts["hits_by_step"] for _, r in singles]
    assert hits[0] == [0, *[1] * 7] and hits[1] == [0, 1, *[0] * 6]
    assert report.facts["hits_by_step"] == [a + b for a, b in zip(*hits, strict=True)]


def test_heun_has_two_evaluations(files: dict[str, str]) -> None:
    setup = Setup("pixart", steps=8, solver="heun")
    _, report = setup.cached(MagCache(0.06, files["magcache"], retention=0.25))
    # Steps 2, 3, 5 and 6, twice each: the first step evaluates once, and the last.
    assert report.facts["hits_by_step"] == [0, 0, 2, 2, 0, 2, 2, 0]
    _, report = setup.cached(TeaCache(1e6, files["teacache"]))
    assert report.facts["hits_by_step"] == [0, 1, *[2] * 5, 1]


@both
def test_guidance_in_an_interval_reuses_nothing_stale(cache: str, files: dict[str, str]) -> None:
    """Branches of the eight steps: c c c j j j c c.

    TeaCache has not seen what changed between 2 and 6, so it computes; MagCache's plan means step 0's residual there,
    and the joint batch, of which it has none, is computed.
    """
    plugin = TeaCache(1e6, files[cache]) if cache == "teacache" else MagCache(1e6, files[cache], 9, 0.0)
    out, report = Setup("pixart", guidance=3.0, interval=(0.3, 0.7)).cached(plugin)
    expected = {"teacache": [0, 1, 1, 0, 2, 2, 0, 1], "magcache": [0, 1, 1, 0, 0, 0, 1, 1]}
    assert report.facts["hits_by_step"] == expected[cache] and out.isfinite().all()


@both
def test_no_error_where_nothing_changes(cache: str, files: dict[str, str]) -> None:
    setup = Setup("pixart", guidance=3.0)
    plain = setup.generate((0, 1), blind=True)
    out, report = setup.cached(acting(cache, "pixart", files), (0, 1), blind=True)
    assert close(out, plain) and report.did > 0


def test_a_lower_threshold_is_nearer(files: dict[str, str]) -> None:
    setup = Setup("pixart", steps=8)
    plain = setup.generate((0, 1))
    errors = [
        float((setup.cached(TeaCache(t, files["teacache"]), (0, 1))[0] - plain).square().mean())
        for t in (0.1, 0.3, 3.0)
    ]
    assert errors == sorted(errors) and errors[0] < errors[2] / 2


def test_limits(files: dict[str, str]) -> None:
    file = files["teacache"]
    for options, hits in (
        ({"warmup": 3, "last": 2}, [0, 0, 0, 1, 1, 1, 0, 0]),
        ({"max_consecutive": 2}, [0, 1, 1, 0, 1, 1, 0, 1]),
    ):
        _, report = Setup("pixart").cached(TeaCache(1e6, file, **options))
        assert report.facts["hits_by_step"] == hits


def test_magcache_is_diffusers_own(files: dict[str, str]) -> None:
    """The same ratios, threshold, K and retention on Flux, one of the classes that diffusers' hook knows."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
    from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache

    setup = Setup("flux")
    ours, report = setup.cached(MagCache(0.06, files["magcache"], retention=0.25))
    ratios = torch.tensor(RATIOS[0], dtype=torch.float64)
    config = MagCacheConfig(
        threshold=0.06, max_skip_steps=3, retention_ratio=0.25, num_inference_steps=8, mag_ratios=ratios
    )
    apply_mag_cache(setup.module, config)
    registries: list[HookRegistry] = [
        m._diffusers_hook for m in setup.module.modules() if hasattr(m, "_diffusers_hook")
    ]
    try:
        _set_cache_context(setup.module, CacheContext("cond"))
        theirs = setup.generate()
    finally:
        for registry in registries:
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)
        for module in setup.module.modules():
            module.__dict__.pop("_diffusers_hook", None)
            module.__dict__.pop("forward", None)
    assert report.facts["hits_by_step"] == [0, 0, 1, 1, 0, 1, 1, 0]
    assert close(ours, theirs) and not close(ours, setup.generate())


def test_rules_about_ranks_and_guests() -> None:
    """C6 and C7: TeaCache decides from the data, MagCache before the run."""
    for cls, found in ((TeaCache, {"branch-axis": ["C6"], "patch-axis": ["C7"]}), (MagCache, {})):
        for word in ("branch-axis", "patch-axis"):
            chain = [Member("it", "cache", cls.effects), Member("other", "parallelize", frozenset({word}))]
            assert [f.rule.id for f in check(chain)] == found.get(word, [])


def test_a_compiled_network_gives_what_a_plain_one_gives(files: dict[str, str]) -> None:
    """C30: enable the cache, then compile; decisions and stored outputs are Python's, around the graphs."""
    setup = Setup("pixart", steps=8)
    for cache in ("teacache", "magcache"):
        plugin = acting(cache, "pixart", files)
        expected, plain = setup.cached(plugin, (0, 1))
        with setup.applied(plugin, seeds=(0, 1)) as wraps:
            setup.module.compile(backend="eager")
            try:
                out = setup.generate((0, 1), wraps)
            finally:
                setup.module._compiled_call_impl = None
                torch._dynamo.reset()
        assert close(out, expected) and wraps[0].report().facts["hits_by_step"] == plain.facts["hits_by_step"]


# ---- calibrating ---------------------------------------------------------------------------------


def test_teacache_calibrates_what_it_reads() -> None:
    tiny = TinyProblem(Tiny.build(), samples=6, checks=3)
    content = calibrated("teacache", TeaCacheMethod(degree=3, min_r2=-1e9), tiny)
    facts = content.made
    assert facts["pairs"] == 6 * 2 * 10 and facts["held_out_pairs"] == 3 * 2 * 10
    low, high = content.values["range"]
    assert 0 < low < high and len(content.values["coefficients"]) == 4
    with pytest.raises(ConfigError, match=r"explains R2 = .* of the held-out changes, less than min_r2 = 1"):
        TeaCacheMethod(min_r2=1.0).fit(tiny)
    assert not any("forward" in m.__dict__ for m in tiny.network.module.modules())


def test_the_fit_finds_a_polynomial_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from suite.plugins.cache.calibrate import teacache as module

    numbers = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()

    def sample(title: str, install: Any, held_out: bool) -> None:
        watch = install.__self__.policy
        watch.pairs += [(x, 0.1 + 0.5 * x - 0.3 * x**3) for x in (numbers[:150] if not held_out else numbers[150:])]

    problem = TinyProblem()
    monkeypatch.setattr(problem, "sample", sample)
    measured = module.TeaCache(degree=3).fit(problem)
    assert measured.values["coefficients"] == pytest.approx([0.1, 0.5, 0.0, -0.3], abs=1e-9)
    assert measured.facts["r2"] == pytest.approx(1.0)


def test_magcache_calibrates_diffusers_ratio() -> None:
    """mean over tokens of |r_k| / |r_(k-1)|, of one sample, from the blocks' inputs and outputs."""
    problem = TinyProblem(samples=1, checks=1)
    content = calibrated("magcache", MagCacheMethod(), problem)
    assert len(content.values["ratios"]) == 1 and content.values["ratios"][0][0] == 1.0
    blocks, module = problem.network.blocks("block"), problem.network.module
    ins, outs = [], []
    hooks = [
        blocks[0].module.register_forward_pre_hook(
            lambda m, a, k: ins.append((a or [k["hidden_states"]])[0]), with_kwargs=True
        ),
        blocks[-1].module.register_forward_hook(lambda m, a, out: outs.append(out)),
    ]
    problem.tiny.generate((0,))
    for hook in hooks:
        hook.remove()
    residuals = [b - a for a, b in zip(ins, outs, strict=True)]
    for step in (1, 5, 10):
        ratio = (residuals[step].norm(dim=-1) / residuals[step - 1].norm(dim=-1)).mean()
        assert content.values["ratios"][0][step] == pytest.approx(float(ratio), rel=1e-5)
    assert module is problem.network.module
    with pytest.raises(ConfigError, match=r"from the curve, more than max_spread"):
        MagCacheMethod(max_spread=1e-9).fit(TinyProblem())


#: What `configs/calibrations` holds for the conformance kit, and how it was made.
KIT = {"teacache": TeaCacheMethod(degree=1, min_r2=-1e9), "magcache": MagCacheMethod()}


@pytest.mark.parametrize("name", KIT)
def test_the_kits_calibrations_are_current(name: str) -> None:
    made, kept = calibrated(name, KIT[name]), cache_file.read(cache_file.shipped()[f"{name}-tiny-11"], name)
    assert kept.stamp == made.stamp and kept.times == pytest.approx(made.times)
    assert numbers(kept.values) == pytest.approx(numbers(made.values), rel=0.02, abs=1e-3)


def numbers(value: Any) -> list[float]:
    """All numbers in plain data, in order; None is -1."""
    if isinstance(value, dict | list):
        return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)]
    return [-1.0 if value is None else float(value)]


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(files: dict[str, str]) -> None:
    content = cache_file.read(Path(files["magcache"]), "magcache")
    assert content.stamp == RunStamp("m", "n", "ddim", 8, "uniform", "") and content.values["ratios"][0] == RATIOS[0]
    assert [content.index(t) for t in content.times[1:]] == list(range(8))
    assert content.index(1.0) is None and content.index(0.4) is None and content.index(0.5 + 1e-12) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "suite-grid/1"}, 'expected an object with "format": "suite-cache/1"'),
        ({"method": "magcache"}, "is for the cache magcache, not for teacache"),
        ({"stamp": {"model": "m"}}, "its stamp must give model, noise, solver, schedule, compress"),
        ({"times": [1.0, 0.0]}, r"expected 8 \+ 1 times"),
        ({"values": []}, "expected an object `values`"),
    ],
)
def test_a_bad_file_is_refused(files: dict[str, str], change: dict[str, Any], said: str) -> None:
    path = Path(files["teacache"])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        TeaCache(file=str(path)).cache(Setup("pixart").network, a_run(steps=8))


def test_an_unreadable_or_absent_file(tmp_path: Path, files: dict[str, str]) -> None:
    network = Setup("pixart").network
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    for file, said in ((str(tmp_path / "x.json"), "is not UTF-8"), ("nowhere.json", r"no calibration 'nowhere.json'")):
        with pytest.raises(ConfigError, match=said):
            TeaCache(file=file).cache(network, a_run(steps=8))
    with pytest.raises(ConfigError, match=r"needs a calibration for oracle, 8 steps.*suite cache calibrate teacache"):
        TeaCache().cache(network, a_run(steps=8))
    with pytest.raises(ConfigError, match=r"was fitted to 8 steps, not 9"):
        TeaCache(file=files["teacache"]).cache(network, a_run(steps=9))
    with pytest.raises(ConfigError, match=r"ratios must give 8 numbers"):
        path = Path(files["magcache"])
        path.write_text(path.read_text().replace('"ratios"', '"other"'))
        MagCache(file=str(path)).cache(network, a_run(steps=8))


def test_times_that_are_not_in_the_file_are_computed(files: dict[str, str]) -> None:
    """A run that begins in the middle at a time of its own: its first step is not one of the file's."""
    setup, x = Setup("pixart"), torch.zeros(1, 4, 8, 8)
    with setup.applied(MagCache(1e6, files["magcache"], 9, 0.0)) as wraps, torch.inference_mode():
        for step, (t, s) in enumerate(((0.7, 0.6), (0.6, 0.5), (0.5, 0.375), (0.375, 0.25))):
            call = Call(step, 4, t, s)
            setup.denoiser(wraps).denoise(x, torch.tensor(t).double(), _tiny.conditioning((0,)), call)
    # The plan reuses what step 0 gave; here nothing was computed then, so nothing is reused.
    assert wraps[0].report().did == 0


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (TeaCache, {"threshold": "-1"}, r"teacache: threshold = -1.0: expected 0 or more"),
        (TeaCache, {"warmup": "-1"}, r"warmup = -1: expected 0 or more"),
        (TeaCache, {"last": "-1"}, r"last = -1"),
        (TeaCache, {"max_consecutive": "0"}, r"max_consecutive = 0: expected 1 or more"),
        (MagCache, {"threshold": "-1"}, r"magcache: threshold = -1.0"),
        (MagCache, {"max_skip": "0"}, r"max_skip = 0: expected 1 or more"),
        (MagCache, {"retention": "1.5"}, r"retention = 1.5: expected a share"),
        (TeaCacheMethod, {"degree": "0"}, r"degree = 0: expected 1 to 8"),
        (TeaCacheMethod, {"min_r2": "2"}, r"min_r2 = 2.0: expected at most 1"),
        (MagCacheMethod, {"max_spread": "0"}, r"max_spread = 0.0"),
    ],
)
def test_bad_options(cls: type, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


def test_a_u_net_is_refused(files: dict[str, str]) -> None:
    for plugin in (TeaCache(file=files["teacache"]), MagCache(file=files["magcache"])):
        with pytest.raises(ConfigError, match=r"nested in the stages of a U-Net"):
            plugin.cache(Setup("unet").network, a_run(steps=8))
