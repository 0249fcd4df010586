"""Ours against diffusers' caches on the same networks: equal where they mean the same, and why not elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.errors import ConfigError
from suite.plugin import build
from suite.plugins.cache.cache_dit import CacheDiT
from suite.plugins.cache.diffusers_cache import DiffusersCache
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

KINDS = ("attention", "temporal_attention", "cross_attention", "mlp")
RUN = Run("image", "tiny", steps=8)


def taylor(**options: Any) -> DiffusersCache:
    return DiffusersCache("taylorseer", **{"order": 0, **options})


# ---- fora and TaylorSeer of order 0 -------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "dit", "sd3", "flux", "unet", "wan", "cogvideox", "stable-audio", "latte"])
def test_fora_is_taylorseer_of_order_0(name: str) -> None:
    """At N = 2 with one call of warm-up both compute 0, 2, 4, ...; a forecast of order 0 is reuse."""
    setup = Setup(name, guidance=3.0)
    ours, report = setup.cached(FORA(2), (0, 1))
    theirs, other = setup.cached(taylor(interval=2, warmup=1), (0, 1))
    assert torch.equal(ours, theirs)
    assert (report.did, report.facts["skipped_share"]) == (other.did, other.facts["skipped_share"])


@pytest.mark.parametrize("interval", [3, 4])
def test_longer_intervals_differ_by_their_warm_up(interval: int) -> None:
    """TaylorSeer counts from its warm-up: with N - 1 calls of it, computed are 0 .. N - 2, then N, 2N, ...

    So it is `fora` after a start in which all is computed, which is what `pab` says with a window.
    """
    setup, kinds = Setup("pixart", steps=10, guidance=3.0), dict.fromkeys(KINDS, interval)
    theirs, other = setup.cached(taylor(interval=interval, warmup=interval - 1))
    ours, report = setup.cached(PAB(**kinds, start=(interval - 1) / 10, end=1.0))
    assert torch.equal(ours, theirs) and report.did == other.did
    assert not torch.equal(theirs, setup.cached(FORA(interval))[0])


def test_taylorseer_does_not_know_steps() -> None:
    """It counts its own calls. A branch that is away for some steps goes on where it was, with what was kept then.

    Ours counts the steps of the run, so the two differ where guidance acts in an interval.
    """
    setup = Setup("pixart", guidance=3.0, interval=(0.3, 0.7))
    ours, theirs = setup.cached(FORA(2))[0], setup.cached(taylor(interval=2, warmup=1))[0]
    assert not torch.equal(ours, theirs)
    everywhere = replace(setup, interval=(0.0, 1.0))
    assert torch.equal(everywhere.cached(FORA(2))[0], everywhere.cached(taylor(interval=2, warmup=1))[0])


def test_taylorseer_of_higher_order_forecasts() -> None:
    setup = Setup("pixart", steps=16, clock=0.003)
    plain = setup.generate()
    errors = [float((setup.cached(taylor(order=k, warmup=3))[0] - plain).abs().max()) for k in (0, 1)]
    assert errors[1] < errors[0] / 2


# ---- first-block --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "dit", "wan", "flux", "cogvideox"])
@pytest.mark.parametrize("threshold", [0.05, 0.12, 0.3])
def test_first_block_is_theirs_for_one_sample(name: str, threshold: float) -> None:
    setup = Setup(name, steps=12)
    ours, report = setup.cached(FirstBlock(threshold))
    theirs, other = setup.cached(DiffusersCache("first-block", threshold=threshold))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # They count block calls, the last one too; ours counts hits.
    assert sum(report.facts["hits_by_step"]) * (len(setup.network.blocks("block")) - 1) == other.did == report.did


def test_first_block_of_theirs_decides_for_the_batch() -> None:
    """One number for all rows: a sample then depends on its neighbours, and `cond` on `uncond`. Ours decides a row."""
    setup, threshold = Setup("dit", steps=12), 0.22
    for plugin, independent in (
        (FirstBlock(threshold), True),
        (DiffusersCache("first-block", threshold=threshold), False),
    ):
        pair = setup.cached(plugin, (0, 1, 2, 3))[0]
        alone = torch.cat([setup.cached(plugin, (seed,))[0] for seed in range(4)])
        assert (float((pair - alone).abs().max()) < 2e-5) is independent


@pytest.mark.parametrize("name", ["sd3", "latte"])
def test_first_block_of_theirs_fails_where_ours_does_not_or_says_why(name: str) -> None:
    """SD3's last block ends the text, of which their hook takes a difference; Latte's lists differ in shape."""
    setup = Setup(name)
    with pytest.raises(ConfigError, match=r"name=first-block: diffusers' hook does not fit .*; take ours"):
        setup.cached(DiffusersCache("first-block", threshold=0.3))
    if name == "sd3":
        assert setup.cached(FirstBlock(0.3))[1].did > 0


# ---- cache-dit ----------------------------------------------------------------------------------


def cache_dit(threshold: float, **options: Any) -> CacheDiT:
    pytest.importorskip("cache_dit", reason="cache-dit is not installed (extra `caches`)")
    return CacheDiT(threshold, **{"warmup": 1, **options})


@pytest.mark.parametrize("name", ["pixart", "sd3", "wan", "cogvideox", "stable-audio"])
@pytest.mark.parametrize("threshold", [0.12, 0.3])
def test_first_block_is_dbcache_with_one_block_in_front(name: str, threshold: float) -> None:
    """Bit for bit, for one sample: SD3's text too, which diffusers' own hook cannot take."""
    setup = Setup(name, steps=12)
    theirs, other = setup.cached(cache_dit(threshold))
    ours, report = setup.cached(FirstBlock(threshold))
    assert torch.equal(ours, theirs) and other.did == sum(report.facts["hits_by_step"])


def test_dbcache_treats_each_list_of_blocks_apart() -> None:
    """Flux has two lists: theirs keeps a first block of each, ours one of all."""
    setup = Setup("flux", steps=12)
    theirs, ours = setup.cached(cache_dit(0.3)), setup.cached(FirstBlock(0.3))
    assert theirs[1].did > 0 and ours[1].did > 0 and not torch.equal(theirs[0], ours[0])


@pytest.mark.parametrize("batched", [True, False])
def test_dbcache_with_branches_and_two_evaluations(batched: bool) -> None:
    """It counts calls, so each branch and evaluation has a cache of its own; nothing of them is left."""
    setup = Setup("pixart", steps=8, guidance=3.0, solver="heun", batched=batched)
    before = {n: (set(p.__dict__), list(p._modules)) for n, p in setup.module.named_modules()}
    one, two = (setup.cached(cache_dit(0.3)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert len(one[1].facts["skipped"]) == (2 if batched else 4) and min(one[1].facts["skipped"]) > 0
    assert {n: (set(p.__dict__), list(p._modules)) for n, p in setup.module.named_modules()} == before


def test_dbcache_with_blocks_at_the_end() -> None:
    """With a last block that always runs the picture is another, and fewer blocks are skipped."""
    setup = Setup("pixart", steps=12)
    with _tiny.counting(setup.network, "block") as seen:
        out, report = setup.cached(cache_dit(0.3, front=1, back=1))
    assert list(seen.calls.values()) == [12, 12 - report.did, 12] and report.did > 0
    assert report.facts["skipped_share"] == pytest.approx(report.did / 36)
    assert not torch.equal(out, setup.cached(FirstBlock(0.3))[0])


@pytest.mark.parametrize(("network", "options", "message"), [
    ("dit", {}, r"reads more of them than their output.*norm1.*--cache fora"),
    ("unet", {}, "cache-dit looked for one chain of blocks"),
    ("masked-lm", {}, "cache-dit does not find the blocks of ModernBertForMaskedLM"),
    ("pixart", {"front": 2, "back": 1}, r"front \+ back = 3: expected less than 3"),
])  # fmt: skip
def test_networks_that_dbcache_does_not_serve(network: str, options: dict[str, int], message: str) -> None:
    setup = Setup(network)
    with pytest.raises(ConfigError, match=message):
        setup.cached(cache_dit(0.3, **options))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ConfigError, match=r"cache-dit, which is not installed. Type: pip install cache-dit; or take"):
        CacheDiT().cache(Setup("pixart").network, RUN)


# ---- pab ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "wan", "latte", "unet-motion"])
@pytest.mark.parametrize("interval", [2, 3])
def test_pab_is_theirs(name: str, interval: int) -> None:
    """The same interval for each kind, and a window from step 3 to 7 of 10, whose times are 0.7 to 0.3."""
    setup = Setup(name, steps=10, guidance=3.0)
    ours, report = setup.cached(PAB(interval, interval, interval, start=0.3, end=0.8))
    theirs, other = setup.cached(DiffusersCache("pab", interval=interval, start=0.701, end=0.201))
    assert torch.equal(ours, theirs) and report.did == other.did > 0


def test_kinds_that_theirs_does_not_tell_apart() -> None:
    """They look for `blocks` anywhere in a name, so Latte's temporal attention is spatial to them."""
    from diffusers.hooks.pyramid_attention_broadcast import _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS as spatial

    temporal = [ref.name for ref in Setup("latte").network.blocks("temporal_attention")]
    assert temporal and all(any(word in name for word in spatial) for name in temporal)


# ---- mag, and all of them ------------------------------------------------------------------------


def test_mag_skips_by_its_ratios() -> None:
    """Ratios of 1 accumulate no error: after a fifth of the steps it skips three in a row. Large ones skip none."""
    setup = Setup("pixart", steps=10)
    out, report = setup.cached(DiffusersCache("mag", ratios=(1.0,)))
    assert report.did == 3 * 6 and not torch.equal(out, setup.generate())
    out, report = setup.cached(DiffusersCache("mag", ratios=(9.0,)))
    assert report.did == 0 and "computed all of 30 calls" in report.reason and torch.equal(out, setup.generate())


@pytest.mark.parametrize(
    "plugin",
    [
        DiffusersCache("first-block", threshold=0.3),
        taylor(),
        DiffusersCache("pab"),
        DiffusersCache("mag", ratios=(1.0,)),
    ],
    ids=lambda p: p.name,
)
def test_no_trace_is_left(plugin: DiffusersCache) -> None:
    """The library's own removal leaves a forward and a registry on every part; ours leaves nothing."""
    setup = Setup("pixart", guidance=3.0)
    attributes = {name: set(part.__dict__) for name, part in setup.module.named_modules()}
    plain = setup.generate()
    with setup.applied(plugin) as wraps:
        setup.generate((0,), wraps)
        changed = [n for n, part in setup.module.named_modules() if set(part.__dict__) != attributes[n]]
        assert changed
    assert {name: set(part.__dict__) for name, part in setup.module.named_modules()} == attributes
    assert torch.equal(setup.generate(), plain)


def test_hooks_of_others_are_not_touched() -> None:
    from diffusers.hooks import HookRegistry

    setup = Setup("pixart")
    part = setup.module.transformer_blocks[0]
    registry = HookRegistry.check_if_exists_or_initialize(part)
    try:
        with pytest.raises(ConfigError, match=r"BasicTransformerBlock has hooks of diffusers"):
            setup.cached(taylor())
        assert part._diffusers_hook is registry
    finally:
        del part._diffusers_hook


def test_an_error_of_the_network_stays_its_own() -> None:
    setup = Setup("pixart")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = setup.network.blocks("mlp")[0].module.register_forward_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            setup.cached(taylor())
    finally:
        hook.remove()
    assert not any("_diffusers_hook" in part.__dict__ for part in setup.module.modules())


@pytest.mark.parametrize(("name", "network", "message"), [
    ("first-block", "unet", "diffusers cannot put it into UNet2DConditionModel"),
    ("first-block", "stable-audio", "not registered"),
    ("mag", "unet", "found nothing to hook"),
    ("pab", "unet-bare", "found nothing to hook"),
    ("taylorseer", "masked-lm", "hook does not fit ModernBertForMaskedLM"),
])  # fmt: skip
def test_networks_that_they_do_not_know(name: Any, network: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Setup(network).cached(DiffusersCache(name, ratios=(1.0,)))
    assert not any("_diffusers_hook" in part.__dict__ for part in _tiny.module_of(network).modules())


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "faster"}, "expected one of first-block, taylorseer, pab, mag"),
    ({"interval": "0"}, "interval = 0: expected at least 1"),
    ({"warmup": "0"}, "warmup = 0: expected at least 1"),
    ({"start": "0.1", "end": "0.8"}, "expected times from 1"),
    ({"name": "mag"}, "needs ratios that were measured"),
])  # fmt: skip
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DiffusersCache, options, name="diffusers-cache")


@pytest.mark.parametrize(
    "options", [{"threshold": "-1"}, {"front": "0"}, {"back": "-1"}, {"max_consecutive": "0"}], ids=str
)
def test_bad_options_of_dbcache(options: dict[str, str]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"cache-dit: {name} = {value}(\.0)?: expected at least"):
        build(CacheDiT, options, name="cache-dit")
