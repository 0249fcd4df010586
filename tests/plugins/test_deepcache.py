"""DeepCache: what it computes is counted from below, what it gives is recomputed."""

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

from suite.call import Call, activate
from suite.errors import ConfigError
from suite.network import Network
from suite.plugins.cache._outputs import full_steps
from suite.plugins.cache.deepcache import DeepCache, plan_of
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

UNETS = ["unet", "unet-deep", "unet-bare", "unet-motion"]
RUN = Run("image", "tiny", steps=8)


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
