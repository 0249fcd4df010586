"""Chains in which blocks over space and blocks over time take turns (Latte): one sample has many rows in either."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from suite.call import Call, activate, active_rows
from suite.network.chain import by_sample, chain_of, closed, in_turns
from suite.plugin import Plugin
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.taylorseer import TaylorSeer

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

FRAMES, PLACES = 3, 16
SPACE = [f"transformer_blocks.{k}" for k in range(3)]
TIME = [f"temporal_{name}" for name in SPACE]


def test_a_chain_is_closed_where_it_ends_in_the_shape_in_which_it_begins() -> None:
    latte = chain_of(Setup("latte").network, "test")
    assert in_turns(latte) and not in_turns(chain_of(Setup("flux").network, "test"))  # Flux goes over once
    assert [len(closed(latte[:n])) for n in range(2, 7)] == [2, 3, 3, 5, 5]  # two blocks are not seen to take turns
    pixart = chain_of(Setup("pixart").network, "test")
    assert [len(closed(pixart[:n])) for n in (2, 3)] == [2, 3]


def test_blocks_are_told_the_rows_of_the_network() -> None:
    setup, seen = Setup("latte", guidance=3.0), []
    block = setup.network.blocks("block")[1].module
    hook = block.register_forward_hook(lambda m, args, out: seen.append((active_rows(), out.shape[0])))
    setup.generate((0, 1))
    hook.remove()
    assert set(seen) == {(4, 4 * PLACES)} and active_rows() == 0
    with activate(Call(0, 1, 1.0, 0.0)):
        assert active_rows() == 0


def test_rows_of_a_sample_become_an_axis() -> None:
    x = torch.arange(24.0).reshape(6, 2, 2)
    assert torch.equal(by_sample(x, 2)[1], x[3:]) and by_sample(x, 6) is x and by_sample(None, 2) is None  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize(
    ("plugin", "always"), [(TaylorSeer(2, level="residual"), TIME[-1:]), (FirstBlock(1e6), SPACE[:1])]
)
def test_what_runs_in_a_step_that_reuses(plugin: Plugin, always: list[str]) -> None:
    """Counted from below: all but the end that would change the shape, or the block that decides."""
    setup = Setup("latte")
    with _tiny.counting(setup.network, "block") as seen:
        _, report = setup.cached(plugin)
    computed = 4 if isinstance(plugin, TaylorSeer) else 1
    assert seen.calls == {name: 8 if name in always else computed for name in SPACE + TIME}
    skipped = (8 - computed) * (6 - len(always))
    assert report.did == skipped and report.facts["skipped_share"] == pytest.approx(skipped / 48)


def test_rows_that_are_missing_are_computed_for_all_their_frames_and_places() -> None:
    """Of three samples some are computed and some not; those that are see the rows of these samples alone."""
    setup, seeds = Setup("latte"), (0, 1, 2)
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        with _tiny.counting(setup.network, "block") as seen:
            out, report = setup.cached(FirstBlock(threshold), seeds)
        hits = report.facts["hits_by_step"]
        if any(0 < h < 3 for h in hits):
            break
    else:
        pytest.fail(f"no step was mixed: {hits}")
    computed = 24 - sum(hits)
    assert seen.rows[SPACE[1]] == computed * FRAMES and seen.rows[TIME[0]] == computed * PLACES
    alone = torch.cat([setup.cached(FirstBlock(threshold), (seed,))[0] for seed in seeds])
    assert float((out - alone).abs().max()) <= 2e-5


@pytest.mark.parametrize(
    "plugin", [TaylorSeer(2, level="residual"), FirstBlock(0.3), DeltaDiT(2)], ids=lambda p: type(p).__name__
)
def test_nothing_is_lost_where_nothing_changes(plugin: Plugin) -> None:
    """Positions in time, which the network adds between two blocks, are in the residual."""
    setup = Setup("latte", guidance=3.0)
    out, report = setup.cached(plugin, (0, 1), blind=True)
    assert report.did > 0 and float((out - setup.generate((0, 1), blind=True)).abs().max()) <= 2e-5
