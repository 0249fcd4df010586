"""DeepCache, Delta-DiT, PAB and T-GATE: what each computes is counted from below, what it gives is recomputed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite import Engine
from suite.call import Call, activate, first_steps
from suite.denoiser import Counter
from suite.discovery import Entry
from suite.errors import ConfigError, RuleError
from suite.manager import Active, Manager
from suite.network import Network
from suite.plan import Plan, make_plan
from suite.plugin import Plugin, build
from suite.plugins.cache._outputs import centred, every, full_steps, within
from suite.plugins.cache.deepcache import DeepCache, plan_of
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.t_gate import TGate
from suite.plugins.parallelize.cfg import CFGParallel
from suite.recipe import Named, Recipe
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

UNETS = ["unet", "unet-deep", "unet-bare", "unet-motion"]
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


# ---- DeepCache ---------------------------------------------------------------------------------


@contextmanager
def layers(module: nn.Module) -> Iterator[dict[str, int]]:
    """Calls of every residual layer, sampler and attention, by name."""
    calls: dict[str, int] = {}
    hooks = []
    for name, part in module.named_modules():
        if name.rpartition(".")[0].endswith(("resnets", "attentions", "samplers", "motion_modules")):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            hooks.append(part.register_forward_hook(count))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("interval", [2, 3, 20])
def test_deepcache_computes_the_inner_layers_every_nth_step(name: str, interval: int) -> None:
    """At branch 0 the last layer of the way up is all that runs at every step."""
    setup = Setup(name, steps=7)
    with layers(setup.module) as calls:
        _, report = setup.cached(DeepCache(interval))
    last = len(setup.module.up_blocks) - 1
    outer = f"up_blocks.{last}."
    final = len(setup.module.up_blocks[last].resnets) - 1
    for part, count in calls.items():
        runs = part.startswith(outer) and part.endswith(f".{final}")
        assert count == (7 if runs else ceil(7 / interval)), part
    assert (report.did, report.facts["misses"]) == (7 - ceil(7 / interval), ceil(7 / interval))


@pytest.mark.parametrize("name", UNETS)
def test_deepcache_at_every_branch(name: str) -> None:
    """Skip m splits the network: m layers of the way down and m + 1 of the way up are outer ones."""
    setup = Setup(name, steps=4)
    down = [f"down_blocks.{i}.{kind}.{k}" for i, block in enumerate(setup.module.down_blocks)
            for kind, parts in (("resnets", block.resnets), ("downsamplers", block.downsamplers or ()))
            for k in range(len(parts))]  # fmt: skip
    up = [f"up_blocks.{i}.resnets.{k}" for i, block in enumerate(setup.module.up_blocks)
          for k in range(len(block.resnets))]  # fmt: skip
    assert len(up) == 1 + len(down)
    plain, errors = setup.generate(), []
    for branch in range(len(up)):
        with layers(setup.module) as calls:
            out, report = setup.cached(DeepCache(2, branch))
        outer = {part for part in (*down, *up) if calls[part] == 4}
        assert outer == {*down[:branch], *up[len(up) - 1 - branch :]}
        assert {calls[part] for part in (*down, *up)} <= {2, 4}
        errors.append(float((out - plain).abs().max()))
        share = 1 - len([p for p in outer if "resnets" in p]) / len([p for p in (*down, *up) if "resnets" in p])
        assert report.facts["skipped_share"] == pytest.approx(share / 2)
    assert errors[-1] < errors[0], "the more is recomputed, the nearer it is"
    with pytest.raises(ConfigError, match=rf"branch = {len(up)}: expected 0 to {len(up) - 1}, .*{len(up)} skip"):
        DeepCache(2, len(up)).cache(setup.network, RUN)


@pytest.mark.parametrize(("name", "branch"), [("unet", 0), ("unet-deep", 1), ("unet-deep", 4), ("unet-bare", 3)])
def test_deepcache_gives_the_kept_feature_itself(name: str, branch: int) -> None:
    """What enters the outer layers at a reused step is the object that was computed, and what is before it is not."""
    setup, entered = Setup(name, steps=4), []
    stage = next(s for s in plan_of(setup.network, branch).up if s.start < s.stop)
    layer = stage.module.resnets[stage.start]
    # The layer is given the feature and its skip in one tensor; the stage takes the feature as it is.
    hook = layer.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    with setup.applied(DeepCache(4, branch)) as wraps:
        store = wraps[0].report.__closure__  # the wrap's own state
        inner = next(c.cell_contents for c in store or () if hasattr(c.cell_contents, "outputs"))
        seen: list[Tensor] = []
        keep = inner.outputs.find
        inner.outputs.find = lambda *a: (lambda kept: (seen.append(kept.output) if kept else None, kept)[1])(keep(*a))
        setup.generate((0,), wraps)
    hook.remove()
    assert len(seen) == 3 and all(feature is seen[0] for feature in seen)
    channels = seen[0].shape[1]
    assert all(torch.equal(x[:, :channels], seen[0]) for x in entered) and len(entered) == 4


@pytest.mark.parametrize("name", UNETS)
def test_deepcache_reuses_by_the_formula(name: str) -> None:
    """At a reused step the output is that of the outer layers on the feature of the computed step: done by hand."""
    setup, cond = Setup(name), _tiny.conditioning((0,))
    x = torch.randn(2, 1, *_tiny.EVERY[name].shape, generator=torch.Generator().manual_seed(0))
    call = _tiny.EVERY[name].call
    last = setup.module.up_blocks[-1]
    final = last.resnets[-1]
    with torch.inference_mode():
        given: list[Tensor] = []

        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(args[0] if args else kwargs["input_tensor"])

        def put_in(module: nn.Module, args: Any, kwargs: Any) -> Any:
            state, *rest = [*args, *kwargs.values()]
            return (torch.cat([feature, state[:, -skip:]], 1), *rest), {}

        hook = final.register_forward_pre_hook(record, with_kwargs=True)
        call(setup.module, x[0], torch.tensor([500.0]), cond)
        hook.remove()
        skip = setup.module.conv_in.out_channels
        feature = given[0][:, :-skip]
        # Now the whole network at the new input, with that feature put in where the last layer begins.
        hook = final.register_forward_pre_hook(put_in, with_kwargs=True)
        expected = call(setup.module, x[1], torch.tensor([400.0]), cond)
        hook.remove()
        with setup.applied(DeepCache(2)):
            for step, (state, time) in enumerate(zip(x, (500.0, 400.0), strict=True)):
                with activate(Call(step, 8, 0.5, 0.4)):
                    out = call(setup.module, state, torch.tensor([time]), cond)
        plain = call(setup.module, x[1], torch.tensor([400.0]), cond)
    assert torch.equal(out, expected) and not torch.equal(out, plain)


def test_deepcache_follows_its_centred_schedule() -> None:
    setup = Setup("unet", steps=12)
    with _tiny.counting(setup.network, "mid") as seen:
        setup.cached(DeepCache(3, center=0.5, power=2.0))
    assert seen.calls == {"mid_block": 4} and full_steps(12, 3, 0.5, 2.0) != (0, 3, 6, 9)


@pytest.mark.parametrize("how", ["control", "adapter"])
def test_deepcache_recomputes_with_residuals_of_others(how: str) -> None:
    """Rule C31: residuals for stages that a reused step would not run are never lost."""
    setup, cond = Setup("unet"), _tiny.conditioning((0,))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def residuals(step: int) -> dict[str, Any]:
        if step == 4:
            return {}
        if how == "adapter":
            return {"down_intrablock_additional_residuals": [torch.full((1, 8, 4, 4), 0.5), torch.ones(1, 16, 4, 4)]}
        shapes = [(8, 8), (8, 8), (8, 4), (16, 4)]
        return {
            "down_block_additional_residuals": [torch.ones(1, c, n, n) for c, n in shapes],
            "mid_block_additional_residual": torch.ones(1, 16, 4, 4) * step,
        }

    def answers() -> list[Tensor]:
        out = []
        for step in range(6):
            with activate(Call(step, 6, 0.5, 0.4)), torch.inference_mode():
                time = torch.tensor([500.0 - step])
                out.append(setup.module(x, time, cond["text"], **residuals(step), return_dict=False)[0])
        return out

    plain = answers()
    with setup.applied(DeepCache(6)) as wraps:
        cached = answers()
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True)), "nothing may be reused, 4 included"
    report = wraps[0].report()
    assert report.did == 0 and report.facts["with_residuals"] == 5 and "additional residuals" in report.reason


def test_deepcache_says_what_it_looked_for() -> None:
    match = r"looked for a U-Net: stages down_blocks and up_blocks with lists of `resnets`, but PixArt\w+ has 3 block"
    for interval in (1, 2):
        with pytest.raises(ConfigError, match=match):
            DeepCache(interval).cache(Setup("pixart").network, RUN)
    odd = nn.Module()
    odd.down_blocks, odd.up_blocks = (nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))
    with pytest.raises(ConfigError, match=r"but down_blocks.0 \(Linear\) has none"):
        DeepCache().cache(Network(odd), RUN)
    for block in (*odd.down_blocks, *odd.up_blocks):
        block.resnets = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"the way down gives 2 and the way up has 1 layers"):
        DeepCache().cache(Network(odd), RUN)


def test_deepcache_refuses_features_that_change_in_place() -> None:
    setup = Setup("unet")
    setup.module.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        with pytest.raises(ConfigError, match=r"FreeU changes features in place.*disable_freeu"):
            DeepCache().cache(setup.network, RUN)
    finally:
        setup.module.disable_freeu()
    assert DeepCache().cache(setup.network, RUN)


def test_a_stage_is_whole_again_after_an_error() -> None:
    """Shortened lists are put back even when a layer raises."""
    setup = Setup("unet-deep", steps=4)
    before = {n: [id(m) for m in p] for n, p in setup.module.named_modules() if isinstance(p, nn.ModuleList)}

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with setup.applied(DeepCache(2, 1)) as wraps:
        setup.generate((0,), wraps)
        hook = setup.module.up_blocks[-1].resnets[-1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            setup.generate((0,), wraps)
        hook.remove()
    assert before == {n: [id(m) for m in p] for n, p in setup.module.named_modules() if isinstance(p, nn.ModuleList)}


# ---- Delta-DiT ---------------------------------------------------------------------------------


def run_of(name: str, steps: int, **options: Any) -> tuple[dict[str, list[int]], Any]:
    """Steps at which each block ran, and the report."""
    setup = Setup(name, steps=steps)
    ran: dict[str, list[int]] = {ref.name: [] for ref in setup.network.blocks("block")}
    from suite.call import active_call

    hooks = [
        ref.module.register_forward_pre_hook(lambda m, a, n=ref.name: ran[n].append(active_call().step))
        for ref in setup.network.blocks("block")
    ]
    plugin = DeltaDiT(**options)
    real = {}
    for ref in setup.network.blocks("block"):  # below the patch
        forward = ref.module.forward
        real[ref.name] = []

        def below(*a: Any, forward: Any = forward, n: str = ref.name, **k: Any) -> Any:
            real[n].append(active_call().step)
            return forward(*a, **k)

        ref.module.forward = below
    try:
        with setup.applied(plugin) as wraps:
            setup.generate((0,), wraps)
    finally:
        for ref in setup.network.blocks("block"):
            del ref.module.__dict__["forward"]
        for hook in hooks:
            hook.remove()
    assert all(steps_ == list(range(steps)) for steps_ in ran.values())
    return real, wraps[0].report()


@pytest.mark.parametrize("name", ["pixart", "sd3", "wan", "stable-audio"])
def test_delta_dit_replaces_last_blocks_early_and_first_blocks_late(name: str) -> None:
    """Steps 0 to 4 replace blocks 1 and 2, then blocks 0 and 1; the count of steps begins anew at 5."""
    ran, report = run_of(name, 9, interval=2, gate=0.5, blocks=2)
    assert list(ran.values()) == [[0, 1, 2, 3, 4, 5, 7], [0, 2, 4, 5, 7], [0, 2, 4, 5, 6, 7, 8]]
    assert report.did == 2 * 4 and (report.facts["reused_rear"], report.facts["reused_front"]) == (2, 2)
    assert report.facts["skipped_share"] == pytest.approx(8 / 27)


@pytest.mark.parametrize(("gate", "steps"), [(0.0, [[0, 3], [*range(6)], [*range(6)]]),
                                             (1.0, [[*range(6)], [*range(6)], [0, 3]])])  # fmt: skip
def test_delta_dit_with_one_range(gate: float, steps: list[list[int]]) -> None:
    assert list(run_of("pixart", 6, interval=3, gate=gate)[0].values()) == steps


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "cogvideox"])
def test_delta_dit_adds_what_was_added(name: str) -> None:
    """What leaves the range at a reused step is its input there plus output minus input of the computed step."""
    setup, cond, seen = Setup(name), _tiny.conditioning((0,)), []
    refs = setup.network.blocks("block")
    x = torch.randn(2, 1, *_tiny.EVERY[name].shape, generator=torch.Generator().manual_seed(0))
    names = list(type(refs[-2].module).forward.__code__.co_varnames[1:])

    def given(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = {**dict(zip(names, args, strict=False)), **kwargs}
        after = output if isinstance(output, tuple) else (output,)
        seen.append(([before[n] for n in refs[-2].hidden], after))

    hooks = [ref.module.register_forward_hook(given, with_kwargs=True) for ref in refs[-2:]]
    with setup.applied(DeltaDiT(2, gate=1.0, blocks=2)) as wraps, torch.inference_mode():
        for step, state in enumerate(x):
            setup.denoiser(wraps).denoise(state, torch.tensor(0.5 - 0.1 * step).double(), cond, Call(step, 8, 0.5, 0.4))
    for hook in hooks:
        hook.remove()
    (start, _), (_, end), (now, _), (_, answer) = seen
    for a, b, c, got in zip(start, end, now, answer, strict=True):
        assert (got is None) if b is None else torch.equal(got, c + (b - a))
        assert b is None or not torch.equal(c, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_delta_plus_input_is_output(dtype: torch.dtype) -> None:
    """On the input of the computed step the answer is the output of the computed step, but for rounding."""
    setup = Setup("pixart")
    plain = setup.generate(blind=True)
    out, report = setup.cached(DeltaDiT(4, blocks=2), blind=True)
    assert report.did > 0
    torch.testing.assert_close(out, plain, rtol=0, atol=2e-6)
    a, b = torch.randn(2, 1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert ((a + (b - a)) - b).abs().max() <= 4 * torch.finfo(dtype).eps * max(a.abs().max(), b.abs().max())


class Numbers(nn.Module):
    """A chain whose blocks add whole numbers, for which every sum is exact."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(Adding(k) for k in range(4)), order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return x


class Adding(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(1, 1)
        self.number = number

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + 10**self.number * hidden_states.remainder(3)
        return hidden_states


def test_delta_plus_input_is_output_exactly() -> None:
    module = Numbers()
    wrap = DeltaDiT(2, gate=1.0, blocks=2).cache(Network(module), RUN)
    assert wrap.network and wrap.undo
    wrap.network(module)
    xs, outs = [torch.arange(5.0), torch.arange(5.0) + 7], []
    for step, x in enumerate(xs):
        with activate(Call(step, 8, 0.5, 0.4)):
            outs.append(module(x))
    with activate(Call(1, 8, 0.5, 0.4)):
        again = module(xs[0])
    wrap.undo()
    middle = [module.blocks[1](module.blocks[0](x)) for x in xs]
    assert torch.equal(outs[0], module(xs[0])) and torch.equal(again, outs[0])
    assert torch.equal(outs[1], middle[1] + (outs[0] - middle[0])) and not torch.equal(outs[1], module(xs[1]))


@pytest.mark.parametrize(("order", "message"), [((0, 1, 3, 2), "blocks.3 ran before blocks.2"),
                                                ((0, 2, 1, 3), "blocks.1 ran before blocks.3"),
                                                ((2, 0, 1, 3), "blocks.0 ran before blocks.3")])  # fmt: skip
def test_delta_dit_refuses_blocks_in_another_order(order: tuple[int, ...], message: str) -> None:
    module = Numbers(order)
    wrap = DeltaDiT(2, gate=1.0, blocks=2).cache(Network(module), RUN)
    assert wrap.network and wrap.undo
    wrap.network(module)
    with activate(Call(0, 8, 0.5, 0.4)), pytest.raises(ConfigError, match=message + r".*--cache fora"):
        module(torch.arange(5.0))
    wrap.undo()


def test_delta_dit_where_space_and_time_alternate() -> None:
    """In the order in which Latte's blocks run, an odd range ends in the shape in which it begins; an even one not."""
    setup = Setup("latte")
    plain = setup.generate()
    for count in (1, 3):
        wrap = DeltaDiT(2, blocks=count).cache(setup.network, RUN)
        assert wrap.network and wrap.undo
        wrap.network(setup.module)
        out = setup.generate((0,), [wrap])
        wrap.undo()
        assert 0 < (out - plain).abs().max() < 0.05 and wrap.report().did == 4 * count
    wrap = DeltaDiT(2, blocks=2).cache(setup.network, RUN)
    assert wrap.network and wrap.undo
    wrap.network(setup.module)
    with pytest.raises(ConfigError, match=r"their difference is not a residual; name another number of blocks"):
        setup.generate((0,), [wrap])
    wrap.undo()


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


# ---- T-GATE ------------------------------------------------------------------------------------


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
