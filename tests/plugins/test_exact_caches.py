"""Exact reuse of the text's keys and values: counted from below, compared bit for bit."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.call import Call
from suite.errors import ConfigError
from suite.network import Network
from suite.plugin import build
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.text_kv import TEXTS, TextKV, equal, text_parts
from suite.rules import Member, check
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

CROSS = ["pixart", "unet", "wan", "stable-audio"]
JOINT = ["sd3", "sd3.5", "flux", "cogvideox"]
#: Parts that see the text: to_k and to_v of each of 3 blocks (of the U-Net: 1 + 1 middle + 2 up), and what is before.
PARTS = {"pixart": 6 + 1, "unet": 8, "wan": 6 + 1, "stable-audio": 6 + 1}


@contextmanager
def projections(network: Network) -> Iterator[Counter[str]]:
    """Count from below how often each part that sees the text is computed."""
    seen: Counter[str] = Counter()
    parts = text_parts(network)

    def counted(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return forward(*args, **kwargs)

        return run

    for name, part in parts:
        part.forward = counted(name, part.forward)
    try:
        yield seen
    finally:
        for _, part in parts:
            del part.__dict__["forward"]


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"solver": "heun", "guidance": 2.0}], ids=str)
def test_text_is_projected_once_and_nothing_changes(name: str, options: dict[str, Any]) -> None:
    setup = Setup(name, **options)
    plain = setup.generate((0, 1))
    with projections(setup.network) as seen:
        out, report = setup.cached(TextKV(), (0, 1))
    assert torch.equal(out, plain)
    assert len(seen) == PARTS[name] and set(seen.values()) == {1}
    evaluations = 14 if setup.solver == "heun" else 8  # Heun: one at the first step and one at the last
    assert report.did == PARTS[name] * (evaluations - 1) and report.facts["misses"] == PARTS[name]
    with projections(setup.network) as seen:
        setup.generate((0, 1))
    assert set(seen.values()) == {evaluations}


@pytest.mark.parametrize("name", CROSS)
def test_branches_have_entries_of_their_own(name: str) -> None:
    """Two calls, one batch of both, or guidance in an interval, where the set of branches changes twice."""
    for setup, sets in [
        (Setup(name, guidance=3.0, batched=False), 2),
        (Setup(name, guidance=3.0, interval=(0.3, 0.7)), 2),
        (Setup(name, guidance=3.0, interval=(0.3, 0.7), batched=False), 2),
    ]:
        plain = setup.generate((0, 1))
        with projections(setup.network) as seen:
            out, _ = setup.cached(TextKV(), (0, 1))
        assert torch.equal(out, plain)
        assert set(seen.values()) == {sets}


@pytest.mark.parametrize("name", CROSS)
def test_another_text_is_computed_anew(name: str) -> None:
    """A text that changes at every evaluation, or now and then, in place of a prompt: nothing stale is used."""
    setup, x = Setup(name), torch.zeros(1, *_tiny.CASES[name].shape)
    texts = [_tiny.conditioning((seed,)) for seed in (0, 1, 0, 1, 2, 3, 4, 5, 0)]
    time = torch.tensor(0.5, dtype=torch.float64)
    with torch.inference_mode():
        calls = [Call(step, 9, 0.5, 0.4) for step in range(9)]
        plain = [setup.denoiser().denoise(x, time, c, k) for c, k in zip(texts, calls, strict=True)]
        with projections(setup.network) as seen, setup.applied(TextKV()) as wraps:
            got = [setup.denoiser(wraps).denoise(x, time, c, k) for c, k in zip(texts, calls, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    # Six texts, the last of which comes back after four others: TEXTS are kept.
    assert TEXTS == 4 and set(seen.values()) == {7}


def test_a_text_that_depends_on_time_is_never_reused() -> None:
    """Compared, not assumed: a network that mixes its time into the text is the plain one, and says so."""
    setup = Setup("pixart")
    case = _tiny.EVERY["pixart"]

    def call(module: nn.Module, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return case.call(module, x, time, {**cond, "text": cond["text"] * (1 + time[0] / 1000)})

    ticking = {**_tiny.EVERY, "pixart": replace(case, call=call)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiny, "EVERY", ticking)
        plain = setup.generate()
        out, report = setup.cached(TextKV())
    assert torch.equal(out, plain)
    assert report.did == 0 and report.reason == "the text was another one at every evaluation"


def test_equal_looks_at_the_numbers() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    assert equal(a, a) and equal(a, a.clone()) and equal(a.view(2, 3), a)
    assert not equal(a, a + 1) and not equal(a, a.half()) and not equal(a, a.reshape(3, 2))
    square = torch.arange(4.0).reshape(2, 2)
    assert not equal(square, square.T)


@pytest.mark.parametrize("other", [FORA(3), FORA(3, kinds=("mlp",)), FirstBlock(0.3)], ids=str)
def test_with_another_cache(other: Any) -> None:
    """It changes nothing of what another cache computes."""
    setup = Setup("pixart", guidance=3.0)
    alone, _ = setup.cached(other, (0, 1))
    for plugins in ((TextKV(), other), (other, TextKV())):
        with setup.applied(*plugins, seeds=(0, 1)) as wraps:
            out = setup.generate((0, 1), wraps)
        reports = [wrap.report() for wrap in wraps]
        assert torch.equal(out, alone) and all(report.did > 0 for report in reports)


def test_with_int8_layers() -> None:
    """Layers that are no `nn.Linear` any more are asked once all the same."""
    from suite.fitting.calibration import Calibration
    from suite.plugins.compress.int8 import Int8
    from suite.testing.tiny import Tiny

    tiny = Tiny.build()
    calibration = Calibration(("one",), lambda prompts: [])
    wrap = Int8(compute="fp32", min_features=16).compress(tiny.network, calibration, tiny.run())
    assert wrap.network is not None
    wrap.network(tiny.module)
    kinds = {type(part).__name__ for name, part in text_parts(tiny.network) if name.endswith(("to_k", "to_v"))}
    assert kinds == {"Int8Linear"}
    plain = tiny.generate((0, 1)).x0
    with projections(tiny.network) as seen:
        cached = TextKV().cache(tiny.network, tiny.run())
        out = tiny.generate((0, 1), cached).x0
        assert cached.undo is not None
        cached.undo()
    assert torch.equal(out, plain) and set(seen.values()) == {1}


def test_memory_is_counted_and_bounded() -> None:
    setup = Setup("pixart")
    _, report = setup.cached(TextKV(), (0, 1))
    # 6 keys and values and the projected caption of width 16, and the text itself, of 2 rows of 5 words.
    assert report.facts["bytes_held"] == 2 * _tiny.WORDS * (7 * 16 + _tiny.TEXT) * 4
    small = 2 * _tiny.WORDS * (3 * 16 + _tiny.TEXT) * 4 / 2**20
    with pytest.raises(ConfigError, match=r"text-kv holds .* MiB at transformer_blocks.* limit_mib = .*; raise it"):
        setup.cached(TextKV(limit_mib=small), (0, 1))
    assert not any("forward" in m.__dict__ for m in setup.module.modules())
    with pytest.raises(ConfigError, match=r"limit_mib = 0.0: expected MiB above 0"):
        build(TextKV, {"limit_mib": "0"}, name="text-kv")


def test_one_evaluation_is_nothing_to_reuse() -> None:
    _, report = Setup("pixart", steps=1).cached(TextKV())
    assert report.did == 0 and report.reason == "each branch was evaluated once"


@pytest.mark.parametrize("name", JOINT)
def test_joint_attention_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"looked for cross-attention .*Transformer.* attention is joint"):
        TextKV().cache(Setup(name).network, Run("image", name))


@pytest.mark.parametrize(
    "network", [Setup("dit").network, Network(nn.Sequential(nn.Linear(2, 2)))], ids=["dit", "none"]
)
def test_no_cross_attention_is_refused(network: Network) -> None:
    with pytest.raises(ConfigError, match=r"text-kv looked for cross-attention with to_k, to_v, but .*; drop --cache"):
        TextKV().cache(network, Run("image", "it"))


def test_allowed_where_step_caches_are_not() -> None:
    """C33, C29, C12: what is compared may be used with random times, with jumps and with many times in a batch."""
    hard = [
        Member("it", "run", frozenset({"distill"})),
        Member("it", "solver", frozenset({"time-jumps", "adaptive-grid", "stochastic-step"})),
        Member("it", "parallelize", frozenset({"trajectory", "batch-axis", "patch-axis"})),
    ]
    for other in hard:
        text = [Member("text-kv", "cache", TextKV().effects), other]
        step = [Member("fora", "cache", FORA().effects), other]
        assert check(text) == []
        assert check(step) != []
