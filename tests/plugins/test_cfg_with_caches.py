"""Guidance branches on two ranks, with caches and guidance in an interval: decisions are those of the batched pair.

A branch that goes on alone after the interval is another thing than it was in the pair: on both ranks or on neither.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from suite.call import Call
from suite.diffusion.denoiser import Cond, Denoiser
from suite.errors import ConfigError, RuleError
from suite.host.discovery import installed
from suite.host.manager import Manager, implemented_hooks, load
from suite.mesh import Mesh
from suite.plugin import Plugin, build
from suite.plugins.parallelize.cfg import CFGParallel
from suite.recipe import from_options
from suite.rules import BOOK, Member, enforce
from suite.testing import Tiny
from suite.testing.checks.parallelize import _Meeting, _ThreadMesh
from suite.testing.tiny import Outcome
from suite.wrap import Wrap, WrapReport

SEEDS = (3, 4)
INTERVAL = (0.3, 0.7)
CACHES: dict[str, type[Plugin]] = {
    name: cls for name, entry in installed().items() if "cache" in implemented_hooks(cls := entry.load())
}


def words(cls: type[Plugin]) -> frozenset[str]:
    return build(cls, cls.acting_options, name="it").effects


STATIC = [
    name for name, cls in sorted(CACHES.items())
    if not {"dynamic-decision", "ends-guidance", "needs-tokens", "trajectory-store"} & words(cls)
]  # fmt: skip


def tiny_for(cls: type[Plugin]) -> Tiny:
    return Tiny.build(network=cls.kit_network)


def cache_of(cls: type[Plugin], name: str, tiny: Tiny) -> Wrap:
    from suite.host.discovery import Entry
    from suite.host.manager import Active

    plugin = build(cls, cls.acting_options, name=name)
    active = Active(Entry(name, "", "", ""), plugin, "cache", name)
    wrap = Manager([active]).cache(tiny.network, tiny.run(SEEDS, guidance_interval=INTERVAL), active, tiny.noise)
    assert wrap is not None
    return wrap


def on_a_rank(tiny: Tiny, mesh: Mesh, cache: Wrap) -> Outcome:
    """As the engine folds them: the ranks' part innermost."""
    run = tiny.run(SEEDS, guidance_interval=INTERVAL, world=2)
    cfg = CFGParallel().parallelize(tiny.network, mesh, run)

    def both(inner: Denoiser) -> Denoiser:
        assert cfg.denoiser is not None
        split = cfg.denoiser(inner)
        return cache.denoiser(split) if cache.denoiser else split

    def loop(inner: Any) -> Any:
        assert cfg.sampler is not None
        return cfg.sampler(cache.sampler(inner) if cache.sampler else inner)

    return tiny.generate(SEEDS, replace(cache, denoiser=both, sampler=loop), run=run)


def two_ranks(cls: type[Plugin], name: str, make: Any = cache_of) -> list[Outcome]:
    meeting = _Meeting(2)
    tinies = [tiny_for(cls) for _ in range(2)]  # built one after the other: they seed the global generator

    def rank(index: int) -> Outcome:
        try:
            cache = make(cls, name, tinies[index])
            return on_a_rank(tinies[index], _ThreadMesh(index, 2, meeting=meeting), cache)
        finally:
            meeting.leave(index)

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(rank, index) for index in range(2)]]


@pytest.mark.parametrize("name", STATIC)
def test_ranks_decide_as_the_batched_pair_does(name: str) -> None:
    cls = CACHES[name]
    one, two = two_ranks(cls, name)
    assert torch.equal(one.x0, two.x0)
    tiny = tiny_for(cls)
    run = tiny.run(SEEDS, guidance_interval=INTERVAL)
    batched = tiny.generate(SEEDS, cache_of(cls, name, tiny), run=run)
    apart_tiny = tiny_for(cls)
    apart = apart_tiny.generate(SEEDS, cache_of(cls, name, apart_tiny), batched=False, run=run)
    size = batched.x0.abs().max()
    # Products of other shapes round differently; other decisions were off by 3e-3.
    assert float((one.x0 - batched.x0).abs().max() / size) < 1e-5
    assert float((apart.x0 - batched.x0).abs().max() / size) < 1e-5
    assert one.counter.depth == batched.counter.depth
    if "exact-reuse" in words(cls):
        return  # it may reuse as it likes
    assert one.report is not None and batched.report is not None and one.report == two.report
    ours, theirs = one.report.facts, batched.report.facts
    if "rows" not in batched.report.what:  # those are a rank's own
        assert (ours.get("hits"), ours.get("misses")) == (theirs.get("hits"), theirs.get("misses"))
    assert [h > 0 for h in ours.get("hits_by_step", [])] == [h > 0 for h in theirs.get("hits_by_step", [])]


def test_what_decides_from_the_data_is_refused_with_a_branch_a_rank() -> None:
    for name, cls in CACHES.items():
        if "dynamic-decision" in words(cls):
            chain = [
                Member(name, "cache", words(cls)), Member("cfg", "parallelize", CFGParallel.effects),
                Member("this run", "run", frozenset({"guided"})),
            ]  # fmt: skip
            with pytest.raises(RuleError, match=r"\(rule C6"):
                enforce(chain, BOOK)
    with pytest.raises(RuleError, match="each rank holds one guidance branch"):
        Manager(load(from_options(cache=["first-block"], parallelize=["cfg"]), installed(), "image")).enforce_rules([])


class ByBranch:
    """A cache as one would write it at first: kept by the branch alone, two of three evaluations reused."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.kept = inner, {}

    def denoise(self, x: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call) -> torch.Tensor:
        if call.step % 3 and call.branch in self.kept:
            return self.kept[call.branch]
        out = self.kept[call.branch] = self.inner.denoise(x, t, cond, call)
        return out


def test_a_cache_that_goes_by_the_branch_alone_is_found_out() -> None:
    def innermost(mesh: Mesh, tiny: Tiny) -> Any:
        run = tiny.run(SEEDS, guidance_interval=INTERVAL, world=2)
        cfg = CFGParallel().parallelize(tiny.network, mesh, run)
        assert cfg.denoiser is not None
        split = cfg.denoiser
        wrap = Wrap(lambda: WrapReport(1, "calls"), denoiser=lambda i: split(ByBranch(i)), sampler=cfg.sampler)
        return tiny.generate(SEEDS, wrap, run=run)

    meeting, tinies = _Meeting(2), [Tiny.build(), Tiny.build()]

    def rank(index: int) -> Outcome:
        try:
            return innermost(_ThreadMesh(index, 2, meeting=meeting), tinies[index])
        finally:
            meeting.leave(index)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(rank, index) for index in range(2)]:
            with pytest.raises(ConfigError, match="ranks ended with different results"):
                future.result()


def test_the_key_says_who_travels_together() -> None:
    call = Call(0, 1, 1.0, 0.0)
    pair = call.on("cond", "uncond", together="cond+uncond")
    assert pair.key == pair.branch == "cond+uncond"
    assert pair.on("cond").key == "cond of cond+uncond"
    assert call.on("cond", together="cond").key == call.key == "cond"
