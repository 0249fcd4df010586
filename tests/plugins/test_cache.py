"""Caches of block outputs: what they skip is counted from below, what they change is compared with the plain run."""

from __future__ import annotations

import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.call import Call, activate
from suite.errors import ConfigError, RuleError
from suite.host.discovery import Entry
from suite.host.manager import Active, Manager
from suite.network import BlockRef, Network
from suite.network.chain import take
from suite.plugin import Plugin, build
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.fora import FORA
from suite.plugins.solvers.ddim import DDIM
from suite.rules import BOOK, Member, check, enforce
from suite.run import Run
from suite.testing import Check, checks_for

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import CASES, Setup

NETWORKS = list(CASES)
CHAINS = [name for name in NETWORKS if name != "unet"]
RUN = Run("image", "tiny", steps=8)
#: Every network with a cache that acts on it, and thresholds at which it skips some steps and not all.
ACTING = [(name, FORA(3)) for name in NETWORKS] + [
    (name, FirstBlock(0.12 if name == "wan" else 0.3)) for name in CHAINS
]
#: Largest difference that the order of a sum of floats may make, relative to x0 of order 4.
ROUNDING = 2e-5


def identify(value: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


acting = pytest.mark.parametrize(("name", "plugin"), ACTING, ids=identify)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= ROUNDING


def active(name: str, plugin: Plugin, hook: str) -> Active:
    target = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
    return Active(Entry(name, target, "under test", "0"), plugin, hook, name)


# ---- the hook ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [FORA(), FirstBlock(0.3)], ids=identify)
def test_hook_cache(plugin: Plugin) -> None:
    """A run asks the hook once, gets a wrap of its own, and finds the network as it was when it is undone."""
    setup, it = Setup("pixart"), active("it", plugin, "cache")
    manager = Manager([it])
    plain, results = setup.generate(), []
    for _ in range(2):
        wrap = manager.cache(setup.network, setup.run((0,)), it)
        assert wrap is not None and wrap.network is not None and wrap.undo is not None
        assert wrap.network(setup.module) is setup.module
        out = setup.generate((0,), [wrap])
        wrap.undo()
        report = wrap.report()
        assert report.did > 0 and report.what and not report.reason
        assert 0 < report.facts["skipped_share"] < 1 and report.facts["bytes_held"] > 0
        results.append((out, report))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], plain)
    assert torch.equal(setup.generate(), plain)


KIT = [c for p in (FORA(3), FirstBlock(0.3)) for c in checks_for(p) if c.name.startswith("wrap_")]


@pytest.mark.parametrize("check", KIT, ids=lambda c: c.id)
def test_conformance_where_they_act(check: Check) -> None:
    """The kit again, with a threshold at which a random network's first block is near enough to be reused."""
    check()


# ---- turned off --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_fora_off_is_bit_identical(name: str) -> None:
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1))
    out, report = setup.cached(FORA(interval=1), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and "interval = 1" in report.reason
    # Installed, but never allowed to reuse.
    out, report = setup.cached(FORA(interval=4, last=8), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and report.reason and report.facts["bytes_held"] == 0


@pytest.mark.parametrize("name", CHAINS)
def test_first_block_off_is_bit_identical(name: str) -> None:
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1))
    out, report = setup.cached(FirstBlock(threshold=0), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and "threshold = 0" in report.reason
    # Installed, but no change is small enough, or no step may be skipped.
    out, report = setup.cached(FirstBlock(threshold=1e-9), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and "smallest relative change was 0." in report.reason
    out, report = setup.cached(FirstBlock(threshold=9.0, warmup=8), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and "warmup = 8" in report.reason


def test_only_the_off_settings_are_lossless() -> None:
    assert [FORA(n).lossless for n in (1, 2)] == [True, False]
    assert [FirstBlock(t).lossless for t in (0.0, 0.1)] == [True, False]


# ---- what is skipped, counted from below -------------------------------------------------------


@pytest.mark.parametrize("interval", [2, 3, 5, 20])
def test_fora_computes_every_nth_step(interval: int) -> None:
    setup = Setup("pixart", steps=7)
    with _tiny.counting(setup.network) as seen:
        _, report = setup.cached(FORA(interval))
    parts = {ref.name: ref.kind != "block" for ref in setup.network.blocks()}
    assert seen.calls == {name: ceil(7 / interval) if part else 7 for name, part in parts.items()}
    computed, all_calls = 9 * ceil(7 / interval), 9 * 7
    assert (report.did, report.facts["misses"]) == (all_calls - computed, computed)
    assert report.facts["skipped_share"] == pytest.approx(1 - computed / all_calls)


@pytest.mark.parametrize("name", NETWORKS)
def test_fora_in_every_network(name: str) -> None:
    setup = Setup(name, steps=7)
    parts = setup.network.blocks("attention", "cross_attention", "mlp")
    with _tiny.counting(setup.network, "attention", "cross_attention", "mlp") as seen:
        _, report = setup.cached(FORA(3))
    assert seen.calls == {ref.name: 3 for ref in parts}
    assert report.did == 4 * len(parts)


def test_fora_of_some_kinds_and_with_full_last_steps() -> None:
    setup = Setup("pixart", steps=8)
    with _tiny.counting(setup.network) as seen:
        setup.cached(FORA(4, last=2, kinds=("mlp",)))
    expected = {"mlp": 4}  # steps 0, 4, 6 and 7
    assert seen.calls == {ref.name: expected.get(ref.kind, 8) for ref in setup.network.blocks()}


def test_fora_holds_one_output_a_part() -> None:
    setup = Setup("pixart")
    for seeds in ((0,), (0, 1)):
        _, report = setup.cached(FORA(2), seeds)
        tokens, width, floats = 16, 16, 4
        assert report.facts["bytes_held"] == 9 * len(seeds) * tokens * width * floats


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=len)
def test_first_block_skips_what_it_says(name: str, seeds: tuple[int, ...]) -> None:
    setup = Setup(name, steps=12)
    first, *others = [ref.name for ref in setup.network.blocks("block")]
    with _tiny.counting(setup.network, "block") as seen:
        _, report = setup.cached(dict(ACTING[len(NETWORKS) :])[name], seeds)
    hits, rows = report.facts["hits_by_step"], 12 * len(seeds)
    assert seen.calls[first] == 12 and seen.rows[first] == rows
    assert {seen.rows[name] for name in others} == {rows - sum(hits)}
    assert {seen.calls[name] for name in others} == {sum(h < len(seeds) for h in hits)}
    assert report.did == sum(hits) * len(others) > 0
    assert report.facts["hit_share"] == pytest.approx(sum(hits) / rows)
    assert report.facts["skipped_share"] == pytest.approx(report.did / (rows * (1 + len(others))))


@pytest.mark.parametrize(
    ("options", "hits"),
    [
        ({}, [0, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0}, [0, 1, 1, 1, 1, 1, 1, 1]),  # nothing is stored at first
        ({"warmup": 3, "last": 2}, [0, 0, 0, 1, 1, 1, 0, 0]),
        ({"max_consecutive": 2}, [0, 1, 1, 0, 1, 1, 0, 1]),
        ({"max_consecutive": 1, "warmup": 2}, [0, 0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_first_block_limits(options: dict[str, int], hits: list[int]) -> None:
    _, report = Setup("pixart").cached(FirstBlock(threshold=1e9, **options))
    assert report.facts["hits_by_step"] == hits


def test_first_block_holds_two_residuals_a_row() -> None:
    _, report = Setup("pixart").cached(FirstBlock(threshold=1e9), (0, 1))
    assert report.facts["bytes_held"] == 2 * (2 * 16 * 16 * 4)
    # With two streams: what the first block adds to the picture, and the rest of picture and text; but SD3's last
    # block ends the text.
    _, report = Setup("cogvideox").cached(FirstBlock(threshold=1e9))
    assert report.facts["bytes_held"] == (2 * 32 + _tiny.WORDS) * 16 * 4
    _, report = Setup("sd3").cached(FirstBlock(threshold=1e9))
    assert report.facts["bytes_held"] == 2 * 16 * 16 * 4


# ---- state -------------------------------------------------------------------------------------


@acting
def test_two_runs_in_a_row_are_equal(name: str, plugin: Plugin) -> None:
    setup = Setup(name, guidance=3.0)
    one, two = (setup.cached(plugin, (0, 1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert one[1].did > 0 and not torch.equal(one[0], setup.generate((0, 1)))


@acting
def test_undo_restores_everything(name: str, plugin: Plugin) -> None:
    setup = Setup(name)
    weights = {k: v.clone() for k, v in setup.module.state_dict().items()}
    plain, forwards = setup.generate(), {n: m.forward for n, m in setup.module.named_modules()}
    with setup.applied(plugin) as wraps:
        assert {n: m.forward for n, m in setup.module.named_modules()} != forwards
        setup.generate((0,), wraps)
    assert {n: m.forward for n, m in setup.module.named_modules()} == forwards
    assert not any("forward" in m.__dict__ for m in setup.module.modules())
    after = setup.module.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], weights[k]) for k in weights)
    assert torch.equal(setup.generate(), plain)


@acting
def test_a_batch_of_two_is_two_singles(name: str, plugin: Plugin) -> None:
    setup = Setup(name, guidance=3.0)
    both, report = setup.cached(plugin, (3, 4))
    alone = [setup.cached(plugin, (seed,)) for seed in (3, 4)]
    assert close(both, torch.cat([x for x, _ in alone]))
    if isinstance(plugin, FirstBlock):
        assert report.facts["hits_by_step"] == [
            a + b for a, b in zip(*(r.facts["hits_by_step"] for _, r in alone), strict=True)
        ]
    else:
        assert report.did == alone[0][1].did  # calls, not rows


@acting
def test_branches_as_one_batch_or_apart(name: str, plugin: Plugin) -> None:
    together, one = Setup(name, guidance=3.0).cached(plugin, (0, 1))
    apart, two = Setup(name, guidance=3.0, batched=False).cached(plugin, (0, 1))
    assert close(together, apart)
    if isinstance(plugin, FirstBlock):
        assert one.facts["hits_by_step"] == two.facts["hits_by_step"]
    else:
        assert 2 * one.did == two.did


def states(name: str, seed: int = 0, steps: int = 8) -> list[Tensor]:
    """Two samples that move at different rates."""
    generator = torch.Generator().manual_seed(seed)
    start, way = torch.randn(2, 2, *CASES[name].shape, generator=generator)
    rate = torch.tensor([0.02, 0.2]).reshape(2, *[1] * len(CASES[name].shape))
    return [start + step * rate * way for step in range(steps)]


@acting
def test_uncond_does_not_reach_cond(name: str, plugin: Plugin) -> None:
    """Whatever the other branch is asked, and in whatever order, `cond` answers the same."""
    setup, path = Setup(name), states(name)
    mine = _tiny.conditioning((1, 2))
    cond = {"cond": mine}
    (alone,), _ = setup.script(plugin, path, ["cond"], **cond)
    for other in (900, 7):
        cond["uncond"] = _tiny.conditioning((other, other + 1))
        for order in (["cond", "uncond"], ["uncond", "cond"]):
            answers, _ = setup.script(plugin, path, order, **cond)
            assert all(torch.equal(a, b) for a, b in zip(alone, answers[order.index("cond")], strict=True))
        (joined,), _ = setup.script(plugin, path, ["cond+uncond"], **cond)
        assert all(close(a, b[:2]) for a, b in zip(alone, joined, strict=True))


def test_guidance_in_an_interval_reuses_nothing_stale() -> None:
    """Branches of the eight steps: c c c j j j c c (j = joint). `cond` comes back in a later interval of steps."""
    setup = Setup("pixart", guidance=3.0, interval=(0.3, 0.7))
    with _tiny.counting(setup.network, "mlp") as seen:
        out, report = setup.cached(FORA(4))
    # Computed at 0; at 3 for the joint batch; at 4; at 6, because what `cond` has is of steps 0 to 3.
    assert set(seen.calls.values()) == {4}
    assert report.facts["misses"] == 4 * 9
    out, report = setup.cached(FirstBlock(1e9, max_consecutive=3))
    assert report.facts["hits_by_step"] == [0, 1, 1, 0, 2, 2, 0, 1]
    assert out.isfinite().all()


@pytest.mark.parametrize("steps", [(0, 3, 5, 6), (0, 3, 4, 7)], ids=str)
def test_fora_does_not_outlive_its_interval(steps: tuple[int, ...]) -> None:
    """A step that something else skips, the first of an interval too, does not keep old outputs alive."""
    setup, x = Setup("pixart"), torch.zeros(1, 4, 8, 8)
    with setup.applied(FORA(4)) as wraps, torch.inference_mode():
        for step in steps:
            call = Call(step, 8, 0.5, 0.4)
            setup.denoiser(wraps).denoise(x, torch.tensor(0.5).double(), _tiny.conditioning((0,)), call)
    assert (wraps[0].report().facts["misses"], wraps[0].report().did) == (2 * 9, 2 * 9)


def test_fora_holds_nothing_that_the_next_step_computes() -> None:
    """The joint batch comes at step 1 alone, and step 2 computes everything: only `cond`, one row, is ever held."""
    _, report = Setup("pixart", guidance=3.0, interval=(0.8, 0.9)).cached(FORA(2))
    assert report.facts["bytes_held"] == 9 * 16 * 16 * 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_two_evaluations_a_step(guidance: float) -> None:
    """Heun on six steps: one evaluation at the first and the last step, two between; each has its own state."""
    setup = Setup("pixart", steps=6, solver="heun", guidance=guidance)
    with _tiny.counting(setup.network, "mlp") as seen:
        _, report = setup.cached(FORA(2))
    # The first evaluation at 0, 2, 4; the second at 1 (nothing stored), 2 and 4.
    assert set(seen.calls.values()) == {6}
    assert report.did == 9 * (10 - 6)
    _, report = setup.cached(FirstBlock(1e9))
    branches = 1 if guidance == 1 else 2
    assert report.facts["hits_by_step"] == [0, branches, *[2 * branches] * 3, branches]


@pytest.mark.parametrize("plugin", [FORA(2), FirstBlock(1e9)], ids=identify)
def test_evaluations_are_kept_apart(plugin: Plugin) -> None:
    """What the second evaluation reuses is what the second evaluation stored."""
    setup, cond = Setup("pixart"), _tiny.conditioning((0,))
    time = torch.tensor(0.5, dtype=torch.float64)
    x = [torch.full((1, 4, 8, 8), v) for v in (0.1, -0.7)]
    with setup.applied(plugin) as wraps, torch.inference_mode():
        denoiser = setup.denoiser(wraps)
        for step in (0, 1):
            answers = [denoiser.denoise(x[e], time, cond, Call(step, 4, 0.5, 0.4, evaluation=e)) for e in (0, 1)]
    plain = [setup.denoiser().denoise(x[e], time, cond, Call(1, 4, 0.5, 0.4)) for e in (0, 1)]
    assert all(close(a, b) for a, b in zip(answers, plain, strict=True))
    assert wraps[0].report().did > 0


# ---- rows of one batch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_rows_decide_apart(name: str) -> None:
    """Of two rows, one that stands still and one that jumps, only the first is reused, and both are right."""
    setup, cond = Setup(name), _tiny.conditioning((1, 1))
    start, jump = torch.randn(2, 1, *CASES[name].shape, generator=torch.Generator().manual_seed(1))
    path = [torch.cat([start, start if step < 2 else 9 * jump * step]) for step in range(4)]
    plugin = FirstBlock(threshold=0.08 if name == "wan" else 0.25)
    with _tiny.counting(setup.network, "block") as seen:
        (both,), (report,) = setup.script(plugin, path, ["cond"], cond=cond)
    rows = [r.name for r in setup.network.blocks("block")]
    one = {k: v[:1] for k, v in cond.items()}
    singles = [setup.script(plugin, [x[i : i + 1] for x in path], ["cond"], cond=one) for i in (0, 1)]
    for step in range(4):
        assert close(both[step], torch.cat([answers[0][step] for answers, _ in singles]))
    hits = [r[0].facts["hits_by_step"] for _, r in singles]
    assert report.facts["hits_by_step"] == [a + b for a, b in zip(*hits, strict=True)]
    assert hits[0] != hits[1] and 1 in report.facts["hits_by_step"]
    assert seen.rows[rows[-1]] == 8 - sum(report.facts["hits_by_step"])


def test_rows_count_their_own_steps() -> None:
    """`max_consecutive` runs for each row from the step at which that row was computed."""
    start, end = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    path = [torch.cat([start, start if step == 0 else 9 * end]) for step in range(6)]
    setup = Setup("pixart", clock=0.0)
    plugin = FirstBlock(threshold=0.02, max_consecutive=1)
    _, (report,) = setup.script(plugin, path, ["cond"], cond=_tiny.conditioning((1, 1)))
    # The first row is computed at 0, 2 and 4; the second at 0, at 1 because it jumped, at 3 and 5.
    assert report.facts["hits_by_step"] == [0, 1, 1, 1, 1, 1]


def test_tables_of_positions_are_not_rows() -> None:
    """A table may have as many positions as the batch has rows; per-sample tables do have a batch axis."""
    rows = torch.tensor([1])
    table, sample = torch.randn(3, 4), torch.randn(3, 5, 4)
    assert take((table, table), "image_rotary_emb", rows, 3)[0] is table
    assert take((sample, table), "image_rotary_emb", rows, 3)[0].shape[0] == 1
    assert take({"mask": table, "scale": 0.5, "none": None}, "kwargs", rows, 3)["mask"].shape == (1, 4)
    assert take(torch.zeros(()), "time", rows, 3).ndim == 0
    assert take(torch.zeros(1, 3), "mask", rows, 3).shape == (1, 3)


# ---- error -------------------------------------------------------------------------------------


def deviation(setup: Setup, plugin: Plugin, seeds: tuple[int, ...] = (0, 1)) -> float:
    """Root mean square difference from the plain run, relative to the plain x0."""
    plain = setup.generate(seeds)
    return float((setup.cached(plugin, seeds)[0] - plain).square().mean().sqrt() / plain.square().mean().sqrt())


def test_first_block_error_is_bounded_by_its_threshold() -> None:
    grid = (0.03, 0.06, 0.12, 0.24, 0.48)
    setups = [Setup(name, steps=16) for name in ("pixart", "sd3", "wan", "stable-audio")]
    errors = [[deviation(setup, FirstBlock(threshold)) for setup in setups] for threshold in grid]
    means = [sum(row) / len(row) for row in errors]
    assert means == sorted(means) and means[0] < means[-1] / 4
    assert all(max(row) < threshold / 2 for row, threshold in zip(errors, grid, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_fora_error_falls_with_the_step(name: str) -> None:
    """What is reused is old by up to N - 1 steps, an error of first order in the step; a longer interval is worse."""
    coarse, fine = (deviation(Setup(name, steps=steps, clock=0.003), FORA(2), (0,)) for steps in (16, 32))
    assert 1.8 < coarse / fine < 2.2
    by_interval = [deviation(Setup(name, steps=16, clock=0.003), FORA(n), (0,)) for n in (2, 4, 8)]
    assert by_interval == sorted(by_interval) and by_interval[0] < 0.02


@acting
def test_no_error_where_the_network_does_not_change(name: str, plugin: Plugin) -> None:
    """A network that sees the same x and t at each step answers the same, so everything may be reused."""
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1), blind=True)
    out, report = setup.cached(plugin, (0, 1), blind=True)
    if isinstance(plugin, FORA):
        assert torch.equal(out, plain)
    else:
        # first + (last - first) is last but for rounding.
        assert close(out, plain) and report.facts["hits_by_step"] == [0, *[4] * 7]


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (FORA, {"interval": "0"}, r"fora: interval = 0: expected at least 1.*fora:interval=2"),
        (FORA, {"last": "-1"}, r"fora: last = -1: expected 0 or more"),
        (
            FORA,
            {"kinds": "mlp/conv"},
            r"kinds = 'mlp/conv': expected some of attention/cross_attention/temporal_attention/mlp",
        ),
        (FORA, {"kinds": ""}, r"kinds = ''"),
        (FirstBlock, {"threshold": "-0.1"}, r"first-block: threshold = -0.1: expected 0 or more.*threshold=0.08"),
        (FirstBlock, {"warmup": "-1"}, r"first-block: warmup = -1"),
        (FirstBlock, {"last": "-2"}, r"first-block: last = -2"),
        (FirstBlock, {"max_consecutive": "0"}, r"max_consecutive = 0: expected at least 1, or none"),
    ],
)
def test_bad_options(cls: type[Plugin], options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


@pytest.mark.parametrize("threshold", [float("inf"), float("nan")])
def test_a_threshold_is_a_number(threshold: float) -> None:
    with pytest.raises(ConfigError, match=f"threshold = {threshold}: expected 0 or more"):
        FirstBlock(threshold)


def test_options_as_text() -> None:
    assert build(FORA, {"interval": "3", "kinds": "mlp/attention"}, name="it") == FORA(3, 0, ("mlp", "attention"))
    assert build(FirstBlock, {"max_consecutive": "none"}, name="it") == FirstBlock()


def test_a_network_without_parts() -> None:
    network = Network(nn.Sequential(nn.Linear(2, 2)))
    looked = "attention, cross_attention, temporal_attention, mlp, but Sequential has no part of any known kind; drop"
    for plugin in (FORA(), FORA(1)):
        with pytest.raises(ConfigError, match=looked):
            plugin.cache(network, RUN)
    with pytest.raises(ConfigError, match=r"at least 2 blocks, but Sequential has no part.*--cache fora"):
        FirstBlock().cache(network, RUN)
    with pytest.raises(ConfigError, match=r"looked for cross_attention, but DiT.* has 3 block, 3 attention, 3 mlp"):
        FORA(kinds=("cross_attention",)).cache(Setup("dit").network, RUN)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_first_block_refuses_nested_blocks(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel has .*2 up.*nested in the stages of a U-Net.*fora"):
        FirstBlock(threshold).cache(Setup("unet").network, RUN)


class Pair(nn.Module):
    """Two blocks whose outputs, and whose order, the test chooses."""

    def __init__(self, *blocks: nn.Module, order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(blocks), order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return x


class Block(nn.Module):
    def __init__(self, tail: int = 0, split: bool = False) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(2, 2)
        self.tail, self.split = tail, split

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = torch.cat([hidden_states, hidden_states[:, : self.tail]], 1)
        return (hidden_states, hidden_states) if self.split else hidden_states


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pair(Block(), Block(tail=2)), r"blocks.1 is given \(1, 3, 2\) and blocks.1 gives \(1, 5, 2\), so"),
        (Pair(Block(), Block(), order=(1, 0)), r"blocks.1 ran before blocks.0"),
        (Pair(Block(split=True), Block()), r"blocks.0 returned 2 values, expected hidden_states"),
    ],
    ids=["shape", "order", "outputs"],
)
def test_first_block_refuses_what_is_no_chain(module: nn.Module, message: str) -> None:
    wrap = FirstBlock().cache(Network(module), RUN)
    assert wrap.network and wrap.undo
    wrap.network(module)
    with activate(Call(0, 8, 1.0, 0.9)), pytest.raises(ConfigError, match=message + ".*; use --cache fora"):
        module(torch.zeros(1, 3, 2))
    wrap.undo()


def test_first_block_refuses_blocks_that_carry_different_states() -> None:
    double, single = (BlockRef(f"blocks.{i}", Block(), "block", h) for i, h in enumerate([("a", "b"), ("a",)]))
    network = Network(nn.Module(), declared=(double, single))
    with pytest.raises(ConfigError, match=r"blocks.0 carries a, b, but blocks.1 carries a, so they are not one chain"):
        FirstBlock().cache(network, RUN)


def test_first_block_leaves_refiners_alone() -> None:
    """Blocks of a sub-network, such as a refiner of the text, do not belong to the chain."""
    module = Pair(Block(), Block())
    module.refiner = Pair(Block(), Block())
    wrap = FirstBlock().cache(Network(module), RUN)
    assert wrap.network and wrap.undo
    wrap.network(module)
    patched = [name for name, part in module.named_modules() if "forward" in part.__dict__]
    wrap.undo()
    assert patched == ["blocks.0", "blocks.1"]


def test_outside_of_an_evaluation() -> None:
    setup = Setup("pixart")
    for plugin in (FORA(), FirstBlock()):
        with setup.applied(plugin), pytest.raises(LookupError, match="no evaluation is running"):
            _tiny.CASES["pixart"].call(setup.module, torch.zeros(1, 4, 8, 8), torch.zeros(1), _tiny.conditioning((0,)))


# ---- rules -------------------------------------------------------------------------------------


def test_two_caches_of_block_outputs_are_forbidden() -> None:
    chain = [active("fora", FORA(), "cache"), active("first-block", FirstBlock(), "cache")]
    with pytest.raises(RuleError, match=r"fora with first-block: two caches .*\(rule C36"):
        Manager(chain).enforce_rules([])
    assert Manager(chain[:1]).enforce_rules([]) == []


@pytest.mark.parametrize("plugin", [FORA(), FirstBlock()], ids=identify)
def test_a_solver_that_draws_noise_is_a_warning(plugin: Plugin) -> None:
    def found(eta: float) -> list[str]:
        chain = [active("ddim", DDIM(eta), "solver"), active("it", plugin, "cache")]
        return [f.rule.id for f in Manager(chain).enforce_rules([])]

    assert found(1.0) == ["C3b"] and found(0.0) == []


@pytest.mark.parametrize(
    ("words", "fora", "first_block"),
    [("few-step", "C4", "C4"), ("branch-axis", "", "C6"), ("patch-axis", "", "C7"), ("pipeline-stages", "C8", "C8")],
)
def test_rules_about_the_rest_of_the_chain(words: str, fora: str, first_block: str) -> None:
    for plugin, expected in ((FORA(), fora), (FirstBlock(), first_block)):
        chain = [Member("it", "cache", plugin.effects), Member("other", "parallelize", frozenset({words}))]
        assert [f.rule.id for f in check(chain, BOOK)] == ([expected] if expected else [])
    assert enforce([Member("it", "cache", FORA().effects)]) == []
