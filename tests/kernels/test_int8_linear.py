"""The int8 linear layer: error bounds, and every product against the dequantised reference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from suite.kernels.int8_linear import (
    Compute,
    Int8Linear,
    has_int8_products,
    quantise_rows,
    quantise_weight,
    reference,
)

PATHS: tuple[Compute, ...] = ("int_mm", "onednn", "bf16", "fp32")
#: (rows, in, out): one row, odd sizes, sizes of a transformer.
SHAPES = ((1, 64, 64), (3, 37, 53), (17, 33, 9), (64, 256, 1024), (130, 1024, 256))
EXACT: tuple[Compute, ...] = ("int_mm", "onednn")

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this CPU has no int8 dot products")


def a_linear(inputs: int, outputs: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def inputs_for(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def exact(layer: Int8Linear, x: Tensor) -> Tensor:
    return reference(x, layer.plain_weight(), layer.scale, layer.bias)


# ---- quantisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_error_is_at_most_half_a_scale(dtype: torch.dtype) -> None:
    weight = inputs_for(53, 37).to(dtype) * torch.logspace(-6, 6, 53).to(dtype)[:, None]
    q, scale = quantise_weight(weight)
    assert q.dtype is torch.int8 and scale.dtype is torch.float32 and scale.shape == (53,)
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    # float32's own rounding of the quotient, next to a half.
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    assert q.abs().max() == 127


def test_row_error_is_at_most_half_a_scale() -> None:
    x = inputs_for(53, 37) * torch.logspace(-6, 6, 53)[:, None]
    q, scale = quantise_rows(x)
    assert ((q.double() * scale.double() - x.double()).abs() <= scale.double() * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("compute", PATHS)
def test_rows_of_zeros_give_the_bias(compute: Compute) -> None:
    linear = a_linear(16, 8)
    linear.weight[3] = 0
    layer = Int8Linear(linear, compute)
    assert layer.scale[3] == 0
    x = inputs_for(5, 16)
    x[2] = 0
    out = layer(x)
    assert out.isfinite().all()
    assert torch.equal(out[:, 3], linear.bias[3].expand(5))
    assert torch.equal(out[2], linear.bias)


def test_representable_weights_are_exact() -> None:
    linear = a_linear(16, 8)
    whole = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(2)).float()
    whole[:, 0] = 127
    linear.weight.copy_(whole * 2.0 ** torch.arange(-4, 4)[:, None])
    x = inputs_for(5, 16)
    assert torch.equal(Int8Linear(linear, "fp32")(x), linear(x))


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = a_linear(4, 4)
    linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        Int8Linear(linear)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of auto"):
        Int8Linear(a_linear(4, 4), "int4")  # pyright: ignore[reportArgumentType]


# ---- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_path_equals_the_reference_within_its_bound(shape: tuple[int, int, int], compute: Compute, bias: bool) -> None:
    rows, width, outputs = shape
    layer = Int8Linear(a_linear(width, outputs, bias=bias), compute)
    x = inputs_for(rows, width)
    wanted = exact(layer, x).double()
    error = (layer(x).double() - wanted).abs()
    sums = layer.plain_weight().double().abs().sum(1) * layer.scale.double()
    largest = x.double().abs().amax(1, keepdim=True)
    if compute == "fp32":
        assert error.max() == 0
    elif compute == "bf16" or layer.reason:
        # Two roundings to 8 bits: of the activations and of the product.
        assert (error <= 2**-8 * (largest * sums + wanted.abs()) + 1e-6).all()
    else:
        # Each activation is off by at most half its row's scale.
        assert (error <= 0.5 * (1 + 1e-3) * largest / 127 * sums + 1e-6).all()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_int8_products_agree_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, outputs = shape
    linear = a_linear(width, outputs).to(dtype)
    x = inputs_for(rows, width).to(dtype)
    one, two = (Int8Linear(linear, compute)(x) for compute in EXACT)
    assert one.dtype is dtype
    assert torch.equal(one, two)


@pytest.mark.parametrize("compute", PATHS)
def test_a_row_does_not_depend_on_the_others(compute: Compute) -> None:
    layer, x = Int8Linear(a_linear(64, 32), compute), inputs_for(8, 64)
    louder = torch.cat([x, 1000 * x])
    assert torch.allclose(layer(louder)[:8], layer(x), rtol=1e-2 if compute == "bf16" else 1e-5, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", EXACT)
def test_tiles_change_nothing(compute: Compute, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int8Linear(a_linear(64, 32).to(dtype), compute), inputs_for(23, 64).to(dtype)
    whole = layer(x)
    monkeypatch.setattr("suite.kernels.int8_linear.TILE", 4 * 32 * 5)
    assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("compute", PATHS)
def test_leading_axes_and_no_rows(compute: Compute) -> None:
    layer, x = Int8Linear(a_linear(16, 8), compute), inputs_for(6, 16)
    assert torch.equal(layer(x.reshape(2, 3, 16)), layer(x).reshape(2, 3, 8))
    assert layer(x[:0]).shape == (0, 8)
    # Another memory order may take another float product.
    assert torch.allclose(layer(x.t().contiguous().t()), layer(x), rtol=1e-2 if compute == "bf16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compute", PATHS)
def test_what_is_not_finite_reaches_the_output(compute: Compute, bad: float) -> None:
    x = inputs_for(3, 16)
    x[1, 5] = bad
    out = Int8Linear(a_linear(16, 8), compute)(x)
    assert not out[1].isfinite().any()
    assert out[0].isfinite().all() and out[2].isfinite().all()


def test_a_cast_to_the_weight_dtype_is_refused() -> None:
    layer = Int8Linear(a_linear(16, 8))
    assert layer.weight.dtype is torch.int8 and layer.compute_dtype is torch.float32
    with pytest.raises(TypeError, match=r"got torch\.int8.*int8:skip"):
        layer(inputs_for(2, 16).to(layer.weight.dtype))


def test_the_gradient_is_that_of_the_reference() -> None:
    layer, x = Int8Linear(a_linear(16, 8)), inputs_for(3, 16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (layer.plain_weight() * layer.scale[:, None]).sum(0).expand(3, 16))


# ---- choice ------------------------------------------------------------------------------------


@needs_int8
def test_auto_takes_an_int8_product_and_keeps_it() -> None:
    layer, x = Int8Linear(a_linear(64, 128)), inputs_for(32, 64)
    assert layer.path is None and not layer.reason
    first = layer(x)
    assert layer.path in EXACT
    path = layer.path
    layer(x[:1])
    assert layer.path == path
    assert torch.equal(first, Int8Linear(a_linear(64, 128), "int_mm")(x))


@pytest.mark.parametrize(("dtype", "path"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_without_int8_products_it_says_so(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, path: str) -> None:
    monkeypatch.setattr("suite.kernels.int8_linear.has_int8_products", lambda: False)
    layer = Int8Linear(a_linear(64, 64).to(dtype))
    assert layer.path == path and "no int8 dot products" in layer.reason
    assert layer(inputs_for(2, 64).to(dtype)).dtype is dtype


# ---- memory and forms --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.30), (torch.bfloat16, 0.55)])
@pytest.mark.parametrize("compute", PATHS)
def test_memory(compute: Compute, dtype: torch.dtype, most: float) -> None:
    linear = a_linear(256, 1024).to(dtype)
    before = linear.weight.untyped_storage().nbytes() + linear.bias.untyped_storage().nbytes()
    layer = Int8Linear(linear, compute)
    layer(inputs_for(4, 256).to(dtype))
    assert layer.nbytes() <= most * before
    if not layer.packed:
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.state_dict().values()}
        assert sum(held.values()) == layer.nbytes()


@needs_int8
@pytest.mark.parametrize("shape", [(37, 53), (256, 64)])
def test_packed_weights_come_back_bit_for_bit(shape: tuple[int, int]) -> None:
    layer = Int8Linear(a_linear(*shape), "onednn")
    plain = layer.weight.clone()
    layer.pack()
    assert layer.packed and torch.equal(layer.plain_weight(), plain)
    assert torch.equal(layer.state_dict()["weight"], plain) and layer.packed
    assert torch.equal(copy.deepcopy(layer).weight, plain) and not layer.packed


@pytest.mark.parametrize("compute", PATHS)
def test_state_dict_and_casts_keep_the_numbers(compute: Compute) -> None:
    layer, x = Int8Linear(a_linear(64, 32), compute), inputs_for(5, 64)
    wanted = layer(x)
    other = Int8Linear(a_linear(64, 32, seed=9), compute)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), wanted)
    scale = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype is torch.float32 and torch.equal(layer.scale, scale)
    assert layer.weight.dtype is torch.int8
    assert next(layer.parameters()).dtype is torch.bfloat16
