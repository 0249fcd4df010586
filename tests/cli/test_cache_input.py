"""Caches that cannot work as written: exit code 2, one line that says what was got and what to type."""

from __future__ import annotations

import json

import pytest

from suite.host.discovery import installed
from suite.plugin import options_of

RUN = ("image", "a red heart", "--steps", 8, "--dtype", "fp32", "-o", "x.png")
#: --cache -> what the message must say; all known before a model is loaded.
EARLY: dict[str, tuple[str, ...]] = {
    "fora:interval=0": ("fora: interval = 0: expected at least 1", "fora:interval=2"),
    "fora:last=-1": ("fora: last = -1: expected 0 or more",),
    "fora:kinds=nose": ("fora: kinds = 'nose'", "attention"),
    "pab:attention=0": ("pab: attention = 0: expected at least 1", "pab:attention=2"),
    "pab:start=0.9,end=0.1": ("pab: start = 0.9, end = 0.1", "pab:start=0.15"),
    "deepcache:interval=0": ("deepcache: interval = 0: expected at least 1",),
    "deepcache:branch=-1": ("deepcache: branch = -1",),
    "delta-dit:interval=0": ("delta-dit: interval = 0: expected at least 1",),
    "delta-dit:gate=1.5": ("delta-dit: gate = 1.5", "0 to 1"),
    "t-gate:interval=0": ("t-gate: interval = 0: expected at least 1",),
    "t-gate:gate=0": ("t-gate: gate = 0", "t-gate:gate=0.4"),
    "taylorseer:interval=0": ("taylorseer: interval = 0: expected at least 1",),
    "taylorseer:order=9": ("taylorseer: order = 9: expected 0 to 4",),
    "forecast:interval=0": ("forecast: interval = 0: expected at least 1",),
    "forecast:warmup=-1": ("forecast: warmup = -1: expected 0 or more steps",),
    "diffusers-cache:interval=0": ("diffusers-cache: interval = 0: expected at least 1",),
    "diffusers-cache:name=mag": ("needs ratios",),
    "cache-dit:threshold=-1": ("cache-dit: threshold = -1",),
    "cache-dit:front=0": ("cache-dit: front = 0: expected at least 1",),
    "first-block:threshold=-0.1": ("first-block: threshold = -0.1: expected 0 or more",),
    "first-block:threshold=nan": ("expected a number",),
    "first-block:max_consecutive=0": ("first-block: max_consecutive = 0: expected at least 1",),
    "teacache:threshold=-1": ("teacache: threshold = -1.0: expected 0 or more",),
    "magcache:threshold=-1": ("magcache: threshold = -1.0: expected 0 or more",),
    "magcache:retention=2": ("magcache: retention = 2.0: expected a share",),
    "block-cache:threshold=-1": ("block-cache: threshold = -1.0: expected 0 or more",),
    "learned:threshold=2": ("learned: threshold = 2.0: expected 0 to 1",),
    "early-exit:depth=0/1": ("early-exit: depth = '0.0/1.0': expected shares above 0",),
    "text-kv:limit_mib=0": ("text-kv: limit_mib = 0.0: expected MiB above 0",),
    "prefix-kv:block=0": ("prefix-kv: block = 0: expected at least 1",),
    "dual-kv:refresh=-1": ("dual-kv: refresh = -1",),
    "nirvana:similarity=0.9/0.1": ("nirvana: similarity = 0.9/0.1: expected rising cosines",),
    "redi:early=0.9,late=0.1": ("redi: early = 0.9, late = 0.1",),
    # calibrations
    "magcache:file=magcache-tiny-11": ("fitted to", "suite cache calibrate magcache"),
    "magcache:file=magcache-emoji-64-50": ("50 steps, not 8", "suite cache calibrate magcache"),
    "teacache:file=magcache-emoji-64-50": ("is for the cache magcache, not for teacache",),
    "teacache:file=absent.json": ("no calibration 'absent.json'", "suite cache calibrate teacache"),
    "teacache": ("needs a calibration for emoji-64 at 8 steps", "suite cache calibrate teacache"),
    "learned:file=broken.json": ("broken.json",),
    "unchanged": ("unchanged", "real vectors"),
}


@pytest.mark.parametrize("cache", EARLY, ids=str)
def test_refused_before_a_model_is_loaded(suite, here, cache: str) -> None:
    (here / "broken.json").write_text("{")
    done = suite(*RUN, "--cache", cache)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    for said in EARLY[cache]:
        assert said in done.err
    assert not (here / "x.png").exists()


def test_every_cache_with_options_is_in_the_table() -> None:
    ours = {n for n, e in installed().items() if e.target.startswith("suite.plugins.cache.")}
    named = {text.partition(":")[0] for text in EARLY}
    assert {n for n in ours if options_of(installed()[n].load())} <= named


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_limit_that_is_none(suite, here, limit: str) -> None:
    done = suite(*RUN, "--cache", "fora", "--cache-limit", limit)
    assert done.code == 2 and "expected MiB above 0, e.g. --cache-limit 512" in done.err


def test_known_with_the_model(suite, here) -> None:
    """What only the network, the disk or the run itself can tell: the same code and clarity."""
    (here / "file").write_text("no folder")
    (here / "other").mkdir()
    (here / "other" / "index.json").write_text('{"format": "something else"}')
    for words, said in (
        # A network without the blocks: what was looked for, and what there is.
        (("--cache", "deepcache"), ("deepcache looked for a U-Net", "PixArtTransformer2DModel has", "6 block")),
        # A store that cannot be used, or is something else.
        (("--cache", "nirvana:store=file"), ("nirvana", "'file'", "name a folder that can be written")),
        (("--cache", "redi:store=other"), ("redi", "the store other is of format", "name another folder")),
        # More cache than allowed: each cache, its bytes, the limit.
        (
            ("--cache", "fora", "--cache", "text-kv", "--cache-limit", "0.5"),
            ("caches hold", "fora 2.25 MiB", "text-kv", "the limit of 0.5 MiB", "--cache-limit", "--batch"),
        ),
    ):
        done = suite(*RUN, *words)
        *warnings, error = done.err.splitlines()
        assert done.code == 2 and error.startswith("error: "), done
        assert all(line.startswith("warning: ") for line in warnings)
        for part in said:
            assert part in error
        assert not (here / "x.png").exists()
    unet = suite(*RUN, "--model", "emoji-unet-32", "--cache", "first-block")
    assert unet.code == 2 and "first-block looked for one chain of blocks, but UNet2DConditionModel has" in unet.err


def test_the_report_of_a_command(suite, here) -> None:
    """`--report` has hits, misses, share, bytes and error, and what all caches held beside the limit."""
    words = ("--cache", "first-block:threshold=0.5", "--cache", "text-kv", "--cache-limit", "64", "--blocks")
    done = suite(*RUN, *words, "--report", "r.json")
    assert done.code == 0, done.err
    (report,) = json.loads((here / "r.json").read_text())["reports"]
    first, text = [p["facts"] for p in report["plugins"] if p["hook"] == "cache"]
    assert first["hits"] > 0 and first["misses"] > 0 and first["error_estimate"] > 0 and first["bytes_held"] > 0
    assert text["hits"] > 0 and text["misses"] > 0 and text["error_estimate"] is None and text["bytes_held"] > 0
    assert report["cache_memory"]["limit"] == 64 * 2**20
    assert text["bytes_held"] < report["cache_memory"]["peak"] <= first["bytes_held"] + text["bytes_held"]
    shown = suite("cache", "show", "r.json")
    assert shown.code == 0 and "transformer_blocks.0.attn1  ########" in shown.out
    inner = next(line for line in shown.out.splitlines() if "transformer_blocks.3 " in line)
    assert "." in inner and inner.split()[1].startswith("#")
    drawn = suite("cache", "show", "r.json", "-o", "r.svg")
    assert drawn.code == 0, drawn.err
    assert (here / "r.svg").read_text().lstrip().startswith("<?xml")
    for words, said in (
        (("absent.json",), "report absent.json cannot be read"),
        (("r.svg",), "report r.svg is not JSON"),
        (("r.json", "-o", "r.txt"), "expected a file that ends in .svg"),
        (("r.json", "--kind", "nose"), "nothing fits; this network has block"),
    ):
        refused = suite("cache", "show", *words)
        assert refused.code == 2 and said in refused.err


def test_nobody_watched(suite, here) -> None:
    (here / "r.json").write_text(json.dumps({"files": [], "reports": [{"plugins": [], "blocks": None}]}))
    done = suite("cache", "show", "r.json")
    assert done.code == 2 and "make it again with --blocks" in done.err
