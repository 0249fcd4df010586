"""Early exit: which blocks run, and depths whose guarantee holds."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from suite.call import Call, activate
from suite.errors import ConfigError
from suite.fitting import cache_file
from suite.network import Network
from suite.plugin import build
from suite.plugins.cache.calibrate.early_exit import EarlyExit as EarlyExitMethod
from suite.plugins.cache.calibrate.early_exit import conformal, consistent
from suite.plugins.cache.early_exit import EarlyExit, depth_at
from suite.testing import Tiny
from suite.testing.calibrating import TinyProblem, calibrated
from suite.testing.oracles import a_run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import CASES, Setup

CHAINS = [name for name in CASES if name != "unet"]
networks = pytest.mark.parametrize("name", CHAINS)


def test_depths_of_a_schedule() -> None:
    assert [depth_at((0.5, 0.75, 1.0), t, 8) for t in (1.0, 0.7, 0.66, 0.34, 0.3, 0.0)] == [4, 4, 6, 6, 8, 8]
    assert depth_at((0.01,), 0.5, 3) == 1 and depth_at((1.0,), 1.0, 3) == 3 and depth_at((0.6,), 0.5, 5) == 3


@networks
def test_full_depth_is_bit_identical(name: str) -> None:
    setup = Setup(name, guidance=3.0)
    plain = setup.generate((0, 1))
    out, report = setup.cached(EarlyExit((1.0,)), (0, 1))
    assert torch.equal(out, plain) and report.did == 0 and "depth = 1.0" in report.reason
    out, report = setup.cached(EarlyExit((0.99, 1.0)), (0, 1))  # installed, and rounded up to all blocks
    assert torch.equal(out, plain) and report.did == 0 and "full depth" in report.reason
    assert EarlyExit((1.0, 1.0)).lossless and not EarlyExit((0.5, 1.0)).lossless


@networks
def test_the_scheduled_blocks_run(name: str) -> None:
    setup = Setup(name, steps=8, guidance=3.0)
    names = [ref.name for ref in setup.network.blocks("block")]
    depths = [depth_at((0.3, 0.6, 1.0), 1 - step / 8, len(names)) for step in range(8)]
    with _tiny.counting(setup.network, "block") as seen:
        out, report = setup.cached(EarlyExit((0.3, 0.6, 1.0)), (3, 4))
    assert seen.calls == {name: sum(d > k for d in depths) for k, name in enumerate(names)}
    assert report.facts["depths"] == depths and report.did == sum(len(names) - d for d in depths)
    assert report.facts["skipped_share"] == pytest.approx(report.did / (8 * len(names)))
    plain = setup.generate((3, 4))
    assert out.isfinite().all() and not torch.equal(out, plain)
    alone = torch.cat([setup.cached(EarlyExit((0.3, 0.6, 1.0)), (s,))[0] for s in (3, 4)])
    assert float((out - alone).abs().max()) < 2e-5
    assert not any("forward" in m.__dict__ for m in setup.module.modules())


def test_leaving_out_a_block_is_the_network_without_it() -> None:
    """The chain without its last block, built from the same weights, answers the same."""
    setup = Setup("pixart", steps=8)
    out, _ = setup.cached(EarlyExit((0.5,)))
    blocks = setup.module.transformer_blocks
    try:
        setup.module.transformer_blocks = nn.ModuleList(list(blocks)[:2])
        assert torch.equal(setup.generate(), out)
    finally:
        setup.module.transformer_blocks = blocks


# ---- calibrating -----------------------------------------------------------------------------------


def test_the_least_consistent_depth() -> None:
    assert consistent([0.5, 0.2, 0.04, 0.0], 0.05) == 3
    assert consistent([0.01, 0.2, 0.04, 0.0], 0.05) == 3  # near by chance, and far again
    assert consistent([0.5, 0.2, 0.1, 0.0], 0.05) == 4 and consistent([0.0, 0.0], 0.05) == 1


def test_the_conformal_quantile() -> None:
    scores = [float(k) for k in range(1, 20)]
    assert conformal(scores, 0.1) == 18 and conformal(scores, 0.05) == 19 and conformal(scores, 0.04) == math.inf


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.5])
def test_coverage_on_exchangeable_scores(epsilon: float) -> None:
    """A further score is covered with probability at least 1 - epsilon, and at most 1 / (n + 1) more."""
    generator, trials, n = torch.Generator().manual_seed(0), 4000, 39
    draws = torch.randn(trials, n + 1, generator=generator).exp()
    covered = sum(float(row[-1]) <= conformal(row[:-1].tolist(), epsilon) for row in draws) / trials
    error = 3 * math.sqrt(epsilon * (1 - epsilon) / trials)
    assert 1 - epsilon - error <= covered <= 1 - epsilon + 1 / (n + 1) + error


def test_depths_are_calibrated_and_used(tmp_path: Path) -> None:
    """A network whose last two blocks do almost nothing may leave them out; with a tight tolerance it may not."""
    tiny = Tiny.build()
    with torch.no_grad():
        for ref in tiny.network.blocks("block")[2:]:
            ref.module.scale_shift_table.zero_()
            for part in (ref.module.attn1.to_out[0], ref.module.attn2.to_out[0], ref.module.ff.net[2]):
                part.weight.mul_(1e-4)
                part.bias.mul_(1e-4)
    problem = TinyProblem(tiny, samples=9, checks=3)
    content = calibrated("early-exit", EarlyExitMethod(0.1, 0.01), problem)
    (depths,) = content.values["depths"]
    assert content.values["blocks"] == 4 and depths[:10] == [2] * 10 and depths[10] <= 2
    assert content.made["coverage"] == 1.0 and content.made["mean_depth"] == sum(depths) / 11
    tight = calibrated("early-exit", EarlyExitMethod(0.1, 1e-9), problem)
    assert tight.values["depths"] == [[4] * 11]
    path = tmp_path / "x.json"
    cache_file.write(path, content)
    wrap = EarlyExit(file=str(path)).cache(tiny.network, tiny.run())
    plain = tiny.generate((0,)).x0
    outcome = tiny.generate((0,), wrap)
    assert wrap.undo
    wrap.undo()
    assert outcome.report is not None and outcome.report.facts["depths"] == depths
    # Each branch of a call is within 0.01; guidance g adds g times one and takes g - 1 times the other.
    guidance = tiny.run().guidance
    assert float((outcome.x0 - plain).norm() / plain.norm()) < 0.01 * (2 * guidance - 1)
    with pytest.raises(ConfigError, match=r"3 samples say nothing about epsilon = 0.1; take --samples 9 or more"):
        EarlyExitMethod(0.1).fit(TinyProblem(tiny, samples=3, checks=1))
    with pytest.raises(ConfigError, match=r"is of 4 blocks, the network has 3"):
        EarlyExit(file=str(path)).cache(Setup("pixart").network, a_run(steps=11))


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (EarlyExit, {"depth": "0/1"}, r"depth = '0.0/1.0': expected shares above 0"),
        (EarlyExit, {"depth": "1.5"}, r"depth = '1.5'"),
        (EarlyExit, {"depth": ""}, r"depth = ''"),
        (EarlyExitMethod, {"epsilon": "0"}, r"epsilon = 0.0: expected more than 0"),
        (EarlyExitMethod, {"tolerance": "0"}, r"tolerance = 0.0: expected more than 0"),
    ],
)
def test_bad_options(cls: type, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


class Shrinking(nn.Module):
    """A block that drops a token."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(2, 2)

    def forward(self, hidden_states: Any) -> Any:
        hidden_states = hidden_states[:, 1:]
        return hidden_states


def test_networks_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match=r"early-exit looked for one chain.*nested in the stages of a U-Net"):
        EarlyExit().cache(Setup("unet").network, a_run())
    module = nn.Module()
    module.blocks = nn.ModuleList([Shrinking(), Shrinking()])
    wrap = EarlyExit((0.5,)).cache(Network(module), a_run(steps=8))
    assert wrap.network and wrap.undo
    wrap.network(module)
    with activate(Call(0, 8, 1.0, 0.9)), pytest.raises(ConfigError, match=r"blocks.0 makes \(1, 2, 2\) of \(1, 3, 2\)"):
        module.blocks[0](torch.zeros(1, 3, 2))
    wrap.undo()
