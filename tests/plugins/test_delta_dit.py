"""Delta-DiT: what it computes is counted from below, what it gives is recomputed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.call import Call, activate
from suite.errors import ConfigError
from suite.network import Network
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.run import Run

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import Setup

RUN = Run("image", "tiny", steps=8)


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
