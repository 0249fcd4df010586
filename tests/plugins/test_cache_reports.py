"""What every cache reports: the same facts under the same names, true against what really ran."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from suite.host.discovery import installed
from suite.observe.activity import Activity
from suite.plugin import build
from suite.testing.checks import Subject
from suite.testing.tiny import Tiny, TinyTokens
from suite.wrap import Wrap

#: Options with which each acts on the kit's network, where these are not its own `acting_options` or defaults.
OPTIONS: dict[str, dict[str, Any]] = {"fora": {"interval": 3}, "first-block": {"threshold": 0.5}}
#: Those whose method says something of its own error.
ESTIMATE = {"first-block", "teacache", "magcache", "block-cache", "learned", "taylorseer", "forecast"}
#: Those that keep nothing.
EMPTY = {"early-exit"}
PARTS = ("attention", "cross_attention", "temporal_attention", "mlp")
#: What `skipped_share` is a share of, where those are parts that the host knows.
COVERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fora", "taylorseer", "block-cache", "learned"), PARTS),
    "pab": ("attention", "cross_attention"),
    **dict.fromkeys(
        ("first-block", "teacache", "magcache", "delta-dit", "early-exit", "forecast", "cache-dit"), ("block",)
    ),
    "diffusers-cache": PARTS,
    "unchanged": ("block",),
}
CACHES = sorted(name for name, e in installed().items() if e.target.startswith("suite.plugins.cache."))


def run(name: str, folder: Path) -> tuple[Any, Activity]:
    """The report of a run on the kit's network, and what really ran."""
    entry = installed()[name]
    cls = entry.load()
    options = OPTIONS.get(name, getattr(cls, "acting_options", {}))
    stores = "trajectory-store" in cls.effects if isinstance(cls.effects, frozenset) else False
    plugin: Any = build(cls, options | ({"store": str(folder)} if stores else {}), name=name)
    subject = Subject(name, plugin)
    tiny = TinyTokens.build() if "needs-tokens" in plugin.effects else Tiny.build(network=cls.kit_network)
    grid = [1 - k / tiny.steps for k in range(tiny.steps + 1)]
    for _ in range(2 if stores else 1):  # the second run finds what the first has stored
        activity = Activity.of(tiny.network, grid)
        activity.install()
        wrap = tiny.wrap(subject.manager("cache"), "cache")
        assert wrap is not None
        tiny.generate((0,), watched(wrap, activity))
        if wrap.undo:
            wrap.undo()
        activity.undo()
    assert not any("forward" in part.__dict__ for part in tiny.module.modules())
    return wrap.report(), activity


def watched(wrap: Wrap, activity: Activity) -> Wrap:
    own, outermost = wrap.denoiser, activity.wrap().denoiser
    assert outermost is not None
    return replace(wrap, denoiser=lambda inner: outermost(own(inner) if own else inner))


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_reports_alike_and_truly(name: str, tmp_path: Path) -> None:
    report, activity = run(name, tmp_path)
    facts = report.facts
    assert list(facts)[:5] == ["hits", "misses", "skipped_share", "bytes_held", "error_estimate"]
    assert report.did > 0 and facts["hits"] > 0
    if not {"nirvana", "redi"} & {name}:  # all rows of these were found
        assert facts["misses"] > 0
    assert 0 < facts["skipped_share"] < 1
    assert (facts["bytes_held"] > 0) == (name not in EMPTY)
    assert (facts["error_estimate"] is not None) == (name in ESTIMATE), facts["error_estimate"]
    if facts["error_estimate"] is not None:
        assert facts["error_estimate"] > 0
    if kinds := COVERS.get(name):
        asked = activity.facts()["asked"]
        shares = [
            sum(share * rows for share, rows in zip(part["computed"], asked, strict=True)) / sum(asked)
            for part in activity.facts()["parts"]
            if part["kind"] in kinds
        ]
        assert facts["skipped_share"] == pytest.approx(1 - sum(shares) / len(shares), abs=1e-3)


def test_what_is_watched_is_where_it_ends_in_time(tmp_path: Path) -> None:
    """A run that skips its first steps asks for nothing there, whatever its own steps are called."""
    report, activity = run("nirvana", tmp_path)
    skipped = report.facts["skipped"]
    assert skipped > 0 and activity.asked[:skipped] == [0] * skipped and all(activity.asked[skipped:])
