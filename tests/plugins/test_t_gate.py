"""T-GATE: what it computes is counted from below; its rules, and how the engine ends guidance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.call import first_steps
from suite.diffusion.denoiser import Counter
from suite.errors import RuleError
from suite.host.discovery import Entry
from suite.host.manager import Active, Manager
from suite.host.plan import Plan, make_plan
from suite.plugin import Plugin
from suite.plugins.cache.deepcache import DeepCache
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.t_gate import TGate
from suite.plugins.parallelize.cfg import CFGParallel
from suite.recipe import Named, Recipe

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup


@pytest.mark.parametrize("name", ["pixart", "unet", "wan", "stable-audio", "latte"])
@pytest.mark.parametrize("gate", [0.1, 0.5, 0.8])
def test_t_gate_costs_steps_plus_gate(name: str, gate: float) -> None:
    """With guidance 2T becomes T + m: two branches before m and one after, and no cross-attention after m."""
    setup, counter, m = Setup(name, steps=10, guidance=3.0), Counter(), first_steps(gate, 10)
    with setup.applied(TGate(gate)) as wraps, _tiny.counting(setup.network, "block") as blocks:
        setup.generate((0,), wraps, counter=counter)
    assert (counter.nfe, counter.depth) == (10 + m, 10)
    rows = setup.module.config.get("video_length", 1) if name == "latte" else 1
    first = setup.network.blocks("block")[0].name
    assert blocks.rows[first] == rows * (10 + m) and blocks.calls[first] == 10
    with _tiny.counting(setup.network, "cross_attention") as crosses:
        _, report = setup.cached(TGate(gate))
    assert set(crosses.calls.values()) == {m}
    assert report.facts["cross_attention_reused"] == len(crosses.calls) * (10 - m) == report.did


@pytest.mark.parametrize("batched", [True, False])
def test_t_gate_keeps_the_mean_of_both_branches(batched: bool) -> None:
    setup, outputs, given = Setup("pixart", steps=6, guidance=3.0, batched=batched), [], []
    ref = setup.network.blocks("cross_attention")[1]
    forward = ref.module.forward

    def below(*args: Any, **kwargs: Any) -> Tensor:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    ref.module.forward = below
    with setup.applied(TGate(0.5)) as wraps:
        hook = ref.module.register_forward_hook(lambda m, a, out: given.append(out))
        setup.generate((0, 1), wraps)
        hook.remove()
    del ref.module.__dict__["forward"]
    calls = 3 if batched else 6
    assert len(outputs) == calls and len(given) == calls + 3
    conditional, unconditional = outputs[-1].chunk(2) if batched else outputs[-2:]
    assert all(torch.equal(out, (conditional + unconditional) / 2) for out in given[calls:])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["pixart", "unet"])
def test_t_gate_open_is_bit_identical(name: str, guidance: float) -> None:
    """m = T, with and without anything installed; T = 8 and a gate that rounds up to it."""
    setup = Setup(name, guidance=guidance)
    plain = setup.generate((0, 1))
    for options in ({"gate": 1.0}, {"gate": 0.9}, {"gate": 1.0, "interval": 2, "warmup": 8}):
        counter = Counter()
        with setup.applied(TGate(**options), seeds=(0, 1)) as wraps:
            out = setup.generate((0, 1), wraps, counter=counter)
        report = wraps[0].report()
        assert torch.equal(out, plain) and counter.nfe == 8 * (1 if guidance == 1 else 2)
        assert report.did == 0 and report.reason


def test_t_gate_without_guidance_keeps_what_there_is() -> None:
    setup = Setup("pixart", steps=6)
    outputs: list[Tensor] = []
    part = setup.network.blocks("cross_attention")[0].module
    hook = part.register_forward_hook(lambda m, a, out: outputs.append(out))
    with setup.applied(TGate(0.5)) as wraps:
        setup.generate((0,), wraps)
    hook.remove()
    assert all(torch.equal(out, outputs[2]) for out in outputs[3:]) and len(outputs) == 6
    assert not torch.equal(outputs[1], outputs[2])


def test_t_gate_and_an_interval_of_guidance() -> None:
    """At steps 4 and 5, the last before the gate, guidance is off already: the mean is over what was evaluated then."""
    setup, counter = Setup("pixart", steps=8, guidance=3.0, interval=(0.6, 1.0)), Counter()
    with setup.applied(TGate(0.75)) as wraps:
        out = setup.generate((0,), wraps, counter=counter)
    assert counter.nfe == 8 + 4 and out.isfinite().all() and wraps[0].report().did == 3 * 2


def test_t_gate_skips_self_attention_before_the_gate() -> None:
    """The second version: of steps 0 to 6, warm-up 0 and 1, then 2 and 5 compute; all after the gate do."""
    setup = Setup("pixart", steps=10)
    with _tiny.counting(setup.network, "attention", "mlp") as seen:
        _, report = setup.cached(TGate(0.7, interval=3, warmup=2))
    expected = {"attention": 2 + 2 + 3, "mlp": 10}
    assert seen.calls == {ref.name: expected[ref.kind] for ref in setup.network.blocks("attention", "mlp")}
    assert report.facts["self_attention_reused"] == 9 and report.facts["cross_attention_reused"] == 9


def test_t_gate_holds_what_it_says() -> None:
    """One output a part and branch before the gate: 3 parts of 16 tokens of width 16."""
    for guidance, branches in ((1.0, 1), (3.0, 2)):
        _, report = Setup("pixart", guidance=guidance).cached(TGate(0.5), (0, 1))
        assert report.facts["bytes_held"] == 3 * branches * 2 * 16 * 16 * 4


def active(name: str, plugin: Plugin, hook: str = "cache") -> Active:
    target = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
    return Active(Entry(name, target, "under test", "0"), plugin, hook, name)


@pytest.mark.parametrize("order", [0, 1])
def test_t_gate_with_deepcache(order: int) -> None:
    """Rule C26: the pair is allowed, in either order: frozen attention inside of stages that are reused.

    T = 10, m = 4: both branches are computed whole at 0 and 3; the one that is left at 4, when it has nothing kept
    yet, at 6 and at 9. Inner cross-attention runs at 0 and 3 only.
    """
    pair = [DeepCache(3), TGate(0.4)]
    pair = pair[::-1] if order else pair
    assert Manager([active("a", pair[0]), active("b", pair[1])]).enforce_rules([]) == []
    setup, counter = Setup("unet", steps=10, guidance=3.0), Counter()
    plain = setup.generate()
    with _tiny.counting(setup.network, "cross_attention", "mid") as seen, setup.applied(*pair) as wraps:
        out = setup.generate((0,), wraps, counter=counter)
    assert counter.nfe == 14 and seen.calls.pop("mid_block") == 5
    inner = {name: calls for name, calls in seen.calls.items() if not name.startswith("up_blocks.1")}
    assert set(inner.values()) == {2}
    assert all(w.report().did > 0 for w in wraps) and out.isfinite().all() and not torch.equal(out, plain)
    assert torch.equal(setup.generate(), plain)


def test_caches_on_the_same_blocks_are_forbidden() -> None:
    for one, other in ((DeepCache(), FORA()), (TGate(), FORA()), (PAB(), DeltaDiT()), (TGate(), PAB())):
        with pytest.raises(RuleError, match=r"one with other: two caches .*\(rule C36"):
            Manager([active("one", one), active("other", other)]).enforce_rules([])


def test_rules_about_guidance_that_ends() -> None:
    cfg = active("cfg", CFGParallel(), "parallelize")
    with pytest.raises(RuleError, match=r"t-gate with cfg: each rank holds one guidance branch.*\(rule C25;"):
        Manager([active("t-gate", TGate()), cfg]).enforce_rules(["guided"])
    (found,) = Manager([active("t-gate", TGate())]).enforce_rules(["negative-prompt"])
    assert found.rule.id == "C25b" and "negative prompt acts only until" in found.message
    assert Manager([active("pab", PAB())]).enforce_rules(["negative-prompt"]) == []


# ---- in the engine -----------------------------------------------------------------------------


def gated() -> Plan:
    wanted = Recipe(cache=(Named("t-gate", {"gate": 0.5}),), steps=8, guidance=2.0, guidance_interval=(0.0, 1.0))
    return make_plan("image", overrides=wanted, model="emoji-unet-32")


def test_a_negative_prompt_is_a_warning_of_the_request() -> None:
    plan = gated()
    assert plan.warnings_for("") == plan.warnings == ()
    (warning,) = plan.warnings_for("ugly")
    assert "t-gate" in warning and "rule C25b" in warning


def test_the_engine_ends_guidance() -> None:
    with Engine(gated()) as engine:
        report = engine.generate("a red apple", negative="ugly").report
    assert (report.nfe, report.depth) == (8 + 4, 8)
    assert report.warnings == list(gated().warnings_for("ugly"))
