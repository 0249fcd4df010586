"""Static caches: which steps compute, PAB, and what every one of them refuses."""

from __future__ import annotations

import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from suite.call import first_steps
from suite.errors import ConfigError
from suite.plugin import Plugin, build
from suite.plugins.cache._outputs import centred, every, full_steps, within
from suite.plugins.cache.deepcache import DeepCache
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.t_gate import TGate
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

RUN = Run("image", "tiny", steps=8)


def computed(anchor: Any, steps: int) -> list[int]:
    return [step for step in range(steps) if anchor(step, steps) == step]


# ---- which steps compute ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchor", "steps", "expected"),
    [
        (every(3), 8, [0, 3, 6]),
        (every(1), 3, [0, 1, 2]),
        (every(4, last=2), 9, [0, 4, 7, 8]),
        (within(3, 0.2, 0.8), 10, [0, 1, 3, 6, 8, 9]),
        (within(2, 0.0, 1.0), 6, [0, 2, 4]),
        (within(9, 0.5, 1.0), 6, [0, 1, 2]),
        (centred(3, 0.0, 1.0), 9, [0, 3, 6]),
    ],
)
def test_anchors(anchor: Any, steps: int, expected: list[int]) -> None:
    assert computed(anchor, steps) == expected
    # What a step reuses was computed at the newest step before it that was.
    for step in range(steps):
        assert anchor(step, steps) == max(s for s in expected if s <= step)


def test_shares_of_a_run_are_rounded_up() -> None:
    assert [first_steps(s, 10) for s in (0, 0.3, 0.31, 0.7, 1)] == [0, 3, 4, 7, 10]
    assert all(first_steps(k / n, n) == k for n in range(1, 60) for k in range(n + 1))


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 60])
@pytest.mark.parametrize(("center", "power"), [(0.0, 1.0), (0.3, 1.4), (0.5, 3.0), (0.99, 10.0)])
def test_centred_steps_are_as_many_as_even_ones(steps: int, interval: int, center: float, power: float) -> None:
    full = full_steps(steps, interval, center, power)
    assert len(full) == ceil(steps / interval) and full[0] == 0 and full[-1] < steps
    assert list(full) == sorted(set(full))


def test_centred_steps_are_those_of_the_paper() -> None:
    """Equation 9 for T = 50, k = 10, c = 15, p = 1.4, computed here by numbers of its own."""
    low, high = -(15 ** (1 / 1.4)), 35 ** (1 / 1.4)
    lines = [low + i * (high - low) / 10 for i in range(10)]
    expected = [int((abs(v) ** 1.4) * (1 if v > 0 else -1) + 15 + 1e-9) for v in lines]
    assert list(full_steps(50, 5, 0.3, 1.4)) == expected
    gaps = [b - a for a, b in zip(expected, [*expected[1:], 50], strict=True)]
    nearest = min(range(10), key=lambda i: abs(expected[i] - 15))
    assert gaps[nearest] < gaps[0] and gaps[nearest] < gaps[-1], "dense about the center"
    assert full_steps(50, 5, 0.3, 1.0) == tuple(range(0, 50, 5)), "a power of 1 is even"


# ---- PAB ---------------------------------------------------------------------------------------


def test_pab_has_an_interval_for_each_kind() -> None:
    """Of 20 steps the window is 4 to 17: attention at even steps, across at 6 and 12, over frames at 4, 8, 12, 16."""
    setup = Setup("latte", steps=20)
    with _tiny.counting(setup.network) as seen:
        _, report = setup.cached(PAB(start=0.2, end=0.9))
    expected = {"attention": 6 + 7, "temporal_attention": 6 + 4, "cross_attention": 6 + 2, "mlp": 20, "block": 20}
    assert seen.calls == {ref.name: expected[ref.kind] for ref in setup.network.blocks()}
    assert report.did == 3 * (60 - 13 - 10 - 8)


@pytest.mark.parametrize("name", ["pixart", "wan", "unet", "latte"])
@pytest.mark.parametrize("interval", [2, 3])
def test_pab_over_the_whole_run_is_fora(name: str, interval: int) -> None:
    setup = Setup(name, guidance=3.0)
    same = dict.fromkeys(("attention", "temporal_attention", "cross_attention", "mlp"), interval)
    out, report = setup.cached(PAB(**same, start=0.0, end=1.0), (0, 1))
    expected, other = setup.cached(FORA(interval), (0, 1))
    assert torch.equal(out, expected) and report.did == other.did and report.facts == other.facts


def test_pab_broadcasts_what_the_step_before_the_window_computed() -> None:
    """Steps 0 to 2 compute; 3 is no multiple of 4 and reuses step 2."""
    setup = Setup("pixart", steps=8)
    with _tiny.counting(setup.network, "attention") as seen:
        setup.cached(PAB(attention=4, cross_attention=1, start=3 / 8, end=1.0))
    assert set(seen.calls.values()) == {4}


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DeepCache, {"interval": "0"}, r"deepcache: interval = 0: expected at least 1"),
        (DeepCache, {"branch": "-1"}, r"deepcache: branch = -1: expected 0 or more"),
        (DeepCache, {"center": "1"}, r"deepcache: center = 1.0: expected a share of the run from 0 to 1, or none"),
        (DeepCache, {"power": "0.5"}, r"deepcache: power = 0.5: expected 1 to 10"),
        (DeltaDiT, {"interval": "0"}, r"delta-dit: interval = 0"),
        (DeltaDiT, {"gate": "1.5"}, r"delta-dit: gate = 1.5: expected a share"),
        (DeltaDiT, {"blocks": "0"}, r"delta-dit: blocks = 0: expected at least 1, or none"),
        (PAB, {"mlp": "0"}, r"pab: mlp = 0: expected at least 1, e.g. pab:mlp=2"),
        (PAB, {"start": "0.9", "end": "0.2"}, r"pab: start = 0.9, end = 0.2: expected two increasing shares"),
        (PAB, {"end": "1.2"}, r"two increasing shares"),
        (TGate, {"gate": "0"}, r"t-gate: gate = 0.0: expected a share above 0"),
        (TGate, {"interval": "0"}, r"t-gate: interval = 0"),
        (TGate, {"warmup": "-1"}, r"t-gate: warmup = -1"),
    ],
)
def test_bad_options(cls: type[Plugin], options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, options, name="it")


def test_networks_without_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"looked for cross_attention, but DiT\w+ has 3 block.*the prompt enters"):
        TGate().cache(Setup("dit").network, RUN)
    with pytest.raises(ConfigError, match=r"looked for attention, temporal_attention, cross_attention, but UNet2D"):
        PAB().cache(Setup("unet-bare").network, RUN)
    with pytest.raises(ConfigError, match=r"blocks = 3: expected at most 2, because PixArt"):
        DeltaDiT(blocks=3).cache(Setup("pixart").network, RUN)
    with pytest.raises(ConfigError, match=r"delta-dit looked for one chain.*nested in the stages"):
        DeltaDiT().cache(Setup("unet").network, RUN)
