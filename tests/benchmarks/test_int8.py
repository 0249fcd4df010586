"""What int8 linear layers cost and gain, on the products of a small transformer.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_int8.py -m bench -s -q

Rounds are interleaved, so that whatever else the machine does falls on all ways alike; a cell is a median
with its quartiles, and a ratio is the median of the ratios within a round.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from suite.kernels.int8_linear import Compute, Int8Linear, has_int8_products, plain_product

ROWS = (64, 128, 512, 2048)
SIZES = ((256, 256), (256, 1024), (1024, 256))
PATHS: tuple[Compute, ...] = ("int_mm", "onednn", "bf16", "fp32")
ROUNDS = 15
#: Seconds one way gets in one round.
SHARE = 0.002
#: Edge of the product, and bytes of the copy, that give the machine's rates.
EDGE, COPY = 1024, 1 << 27


def now() -> float:
    """With one thread its own clock, which stands still while another process has the core."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def rounds_of(ways: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    repeats = {}
    for name, way in ways.items():
        way()
        start = now()
        way()
        repeats[name] = max(1, int(SHARE / (now() - start)))
    out: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = now()
            for _ in range(repeats[name]):
                way()
            out[name].append((now() - start) / repeats[name])
    return out


def spread(values: list[float], digits: int) -> str:
    """`median (first quartile to third)`."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def microseconds(values: list[float]) -> str:
    return spread([1e6 * v for v in values], 0)


def rates() -> dict[str, float]:
    """Best measured operations a second of each kind, and bytes a second."""
    a, b = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE)
    q = torch.randint(-127, 128, (EDGE, EDGE), dtype=torch.int8)
    source = torch.zeros(COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    a16, b16 = a.bfloat16(), b.bfloat16()
    seconds = rounds_of(
        {
            "fp32": lambda: a @ b.t(),
            "bf16": lambda: a16 @ b16.t(),
            "int8": lambda: torch._int_mm(q, q.t()),
            "bytes": lambda: target.copy_(source),
        }
    )
    operations = 2 * EDGE**3
    best = {name: operations / min(values) for name, values in seconds.items()}
    # A copy reads and writes.
    best["bytes"] = 2 * COPY / min(seconds["bytes"])
    return best


@pytest.mark.bench
@torch.inference_mode()
def test_int8_linear() -> None:
    """Prints a table for fp32 and one for bf16 activations."""
    peak = rates()
    print(f"\nthreads {torch.get_num_threads()}, int8 products in hardware: {has_int8_products()}")
    print(
        f"rates: fp32 {peak['fp32'] / 1e12:.2f}, bf16 {peak['bf16'] / 1e12:.2f} TFLOP/s, "
        f"int8 {peak['int8'] / 1e12:.2f} TOP/s, memory {peak['bytes'] / 1e9:.0f} GB/s"
    )
    for dtype in (torch.float32, torch.bfloat16):
        table(dtype, peak)


def table(dtype: torch.dtype, peak: dict[str, float]) -> None:
    size = dtype.itemsize
    print(f"\nactivations {str(dtype).removeprefix('torch.')}; microseconds, median (quartiles)\n")
    print(f"| rows x in x out | floor | Linear | product alone | {' | '.join(PATHS)} | Linear to int_mm |")
    print("|---" * (5 + len(PATHS)) + "|")
    for width, outputs in SIZES:
        for rows in ROWS:
            linear = nn.Linear(width, outputs).to(dtype)
            x = torch.randn(rows, width).to(dtype)
            layers = {path: Int8Linear(linear, path) for path in PATHS}
            q = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
            one = layers["int_mm"]
            ways: dict[str, Callable[[], object]] = {
                "linear": lambda linear=linear, x=x: linear(x),
                "product": lambda q=q, one=one: plain_product(q, one.weight, one.scale),
                **{path: lambda layer=layer, x=x: layer(x) for path, layer in layers.items()},
            }
            seconds = rounds_of(ways)
            ratios = [a / b for a, b in zip(seconds["linear"], seconds["int_mm"], strict=True)]
            moved = width * outputs + size * rows * (width + outputs)
            floor = max(2 * rows * width * outputs / peak["int8"], moved / peak["bytes"])
            cells = [microseconds(seconds[name]) for name in ("linear", "product", *PATHS)]
            print(
                f"| {rows} x {width} x {outputs} | {1e6 * floor:.0f} | {' | '.join(cells)} | {spread(ratios, 2)} |",
                flush=True,
            )
            assert all(v > 0 for values in seconds.values() for v in values)


@pytest.mark.bench
@torch.inference_mode()
def test_whole_network() -> None:
    """A PixArt transformer of 6 blocks, width 256, 64 tokens, batch 2: norms and attention are paid as before."""
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from suite.fitting.calibration import Calibration
    from suite.network import Network
    from suite.plugins.compress.int8 import Int8
    from suite.testing.oracles import a_run

    def build(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        module: Any = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            cross_attention_dim=256,
            sample_size=16,
            patch_size=2,
            caption_channels=384,
            use_additional_conditions=False,
        )
        return module.to(dtype).eval().requires_grad_(False)

    def run(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        x, text = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 4, 16, 16), (2, 16, 384)))
        extra = {"resolution": None, "aspect_ratio": None}
        times = torch.tensor([500.0, 500.0])
        return module(x, text, times, added_cond_kwargs=extra, return_dict=False)[0]

    ways: dict[str, Callable[[], object]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain, small = build(dtype), build(dtype)
        wrap = Int8().compress(Network(small), Calibration((), lambda prompts: []), a_run())
        assert wrap.network is not None
        small = wrap.network(small)
        exact, got = run(plain, dtype).float(), run(small, dtype).float()
        facts = wrap.report().facts
        print(
            f"\n{name}: {wrap.report().did} layers, linear layers {facts['ratio']:.3f} of the bytes, network "
            f"{Network(small).bytes() / Network(plain).bytes():.3f}; output differs by "
            f"{float((got - exact).norm() / exact.norm()):.4f}; weights by {facts['error_mean']:.4f}; {facts['paths']}"
        )
        ways[name] = lambda m=plain, d=dtype: run(m, d)
        ways[f"{name} int8"] = lambda m=small, d=dtype: run(m, d)
    seconds = rounds_of(ways)
    for name, values in seconds.items():
        print(f"{name}: {spread([1e3 * v for v in values], 1)} ms")
    for name in ("fp32", "bf16"):
        pairs = zip(seconds[name], seconds[f"{name} int8"], strict=True)
        print(f"{name} to {name} int8: {spread([a / b for a, b in pairs], 2)}")
