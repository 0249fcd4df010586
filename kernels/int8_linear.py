"""A linear layer whose weights stay int8 in memory, and four ways to multiply by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: `int_mm` and `onednn` quantise the activations too and agree bit for bit; `bf16` and `fp32` do not.
Path = Literal["int_mm", "onednn", "bf16", "fp32"]
Compute = Literal["auto", "int_mm", "onednn", "bf16", "fp32"]
LEVELS = 127
#: Below this a row of activations is taken for zero; 127 / SMALLEST is still finite in float32.
SMALLEST = 1e-30
#: The packed layout must be this much faster before `auto` takes it: it is opaque and pads odd sizes.
ADVANTAGE = 1.15
ROUNDS = 5
#: Bytes of 32-bit sums made at once on a CPU: fresh memory of several MB costs more than the product in it.
TILE = 1 << 21
#: CUDA's int8 product wants more than 16 rows, and sizes that are multiples of 8.
CUDA_ROWS, CUDA_MULTIPLE = 17, 8

_fastest: dict[tuple[int, ...], Path] = {}


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale an output channel; |weight - scale q| <= scale / 2.

    Args:
        weight: [out, in], any floating dtype, finite.

    Returns:
        q int8 [out, in] in [-127, 127], and scale float32 [out] >= 0; zero for a row of zeros.

    Raises:
        ValueError: a weight is not finite.
    """
    exact = weight.detach().float()
    if not exact.isfinite().all():
        raise ValueError(f"weights of shape {tuple(weight.shape)} hold NaN or infinity and cannot be quantised")
    scale = exact.abs().amax(1) / LEVELS
    divisor = torch.where(scale > 0, scale, 1)[:, None]
    return (exact / divisor).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row, found from the row itself.

    A scale a row, not a tensor: a sample's result must not depend on what else is in the batch. NaN and
    infinity make the row's scale NaN or infinite, so they reach the output.

    Args:
        x: [rows, in], any floating dtype.

    Returns:
        q int8 [rows, in] and scale float32 [rows, 1]; |x - scale q| <= scale / 2.
    """
    if x.shape[1] == 0:
        return x.to(torch.int8), torch.zeros(x.shape[0], 1, device=x.device)
    exact = x.float()
    # Two reductions are faster than abs() and one: no copy is made.
    largest = torch.maximum(exact.amax(1, keepdim=True), -exact.amin(1, keepdim=True)).clamp_(min=SMALLEST)
    scaled = exact * (LEVELS / largest) if exact is x else exact.mul_(LEVELS / largest)
    return scaled.round_().to(torch.int8), largest * (1 / LEVELS)


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What every path approximates: dequantise to float32 and multiply. [..., in] -> [..., out], x's dtype."""
    exact = weight.float() * scale[:, None]
    return linear(x.float(), exact, None if bias is None else bias.float()).to(x.dtype)


def plain_product(q: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(q weight^T) scale: int8 [rows, in] and [out, in] and float32 [out] -> float32 [rows, out]."""
    rows = len(q)
    if q.is_cuda and rows < CUDA_ROWS:
        q = torch.cat([q, q.new_zeros(CUDA_ROWS - rows, q.shape[1])])
    # Converted first: a product of mixed dtypes is several times slower.
    return torch._int_mm(q, weight.t())[:rows].float().mul_(scale)


def packed_product(q: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The same from a weight in oneDNN's layout, bit for bit: the sums are whole numbers."""
    # oneDNN is fast for unsigned activations only: shift by 128, which flips the sign bit, and say so.
    shifted = q.view(torch.uint8) ^ 128
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


class Int8Linear(nn.Module):
    """`nn.Linear` with weights that stay int8.

    The buffer `weight` is int8, and so is its dtype: a property that returned something of the compute
    dtype would have to make a copy of the weights at each reading. Code that asks `weight.dtype` in order
    to cast its input therefore sees int8, which diffusers guards against (`is_floating_point`, then
    `compute_dtype`, which this layer has); where it does not, `forward` refuses the integer input rather
    than compute nonsense. The bias stays a parameter in its own dtype, so that
    `next(module.parameters()).dtype` is still the compute dtype.

    After `pack()` the buffer holds oneDNN's opaque layout instead ([in, out]); there is one form at a time.
    Copies, moves and state dicts always see the plain form.

    Attributes:
        weight: int8 [out, in].
        scale: float32 [out], whatever dtype the module is cast to.
        bias: [out] or None.
        compute_dtype: dtype of the layer that it replaces.
        path: how it multiplies; None until `auto` has measured.
        reason: why it does not multiply as asked; empty if it does.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear, compute: Compute = "auto") -> None:
        """Quantise `source`, which is not kept. ValueError: unknown `compute`, or weights not finite."""
        super().__init__()
        if compute not in get_args(Compute):
            raise ValueError(f"compute = {compute!r}: expected one of {', '.join(get_args(Compute))}")
        weight, scale = quantise_weight(source.weight)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.compute_dtype = source.weight.dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = source.bias
        self.compute: Compute = compute
        self.training = source.training
        self.path: Path | None = None
        self.reason = ""
        self._settle()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, compute={self.path or 'auto'}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype.

        Raises:
            TypeError: x is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"an int8 linear layer got {x.dtype}, expected floating point: the caller casts its input to "
                "`weight.dtype`; leave the layer out with --compress int8:skip=NAME"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            # Rounding has no gradient: only the dequantised product is right here.
            return reference(x, self.plain_weight(), self.scale, self.bias)
        rows = x.reshape(-1, self.in_features)
        path = self.path or self._measure(rows)
        out = self._tiled(rows) if path in ("int_mm", "onednn") else getattr(self, f"_{path}")(rows).to(x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def _tiled(self, x: Tensor) -> Tensor:
        """The int8 products a few rows at a time, for cache's and allocator's sake; rows are independent."""
        product = self._onednn if self.path == "onednn" else self._int_mm
        height = self._height()
        if x.is_cuda or len(x) <= height:
            return product(x).to(x.dtype)
        out = x.new_empty(len(x), self.out_features)
        for start in range(0, len(x), height):
            out[start : start + height] = product(x[start : start + height])
        return out

    def _height(self) -> int:
        return max(1, TILE // (4 * self.out_features))

    # ---- the four products: [rows, in] -> [rows, out] ---------------------------------------

    def _int_mm(self, x: Tensor) -> Tensor:
        q, row_scale = quantise_rows(x)
        return self._rescale(plain_product(q, self.weight, self.scale), row_scale)

    def _onednn(self, x: Tensor) -> Tensor:
        self.pack()
        q, row_scale = quantise_rows(x)
        return self._rescale(packed_product(q, self.weight, self.scale), row_scale)

    def _bf16(self, x: Tensor) -> Tensor:
        # int8 is exact in bf16, so the scale can wait until after the product.
        product = linear(x.bfloat16(), self.plain_weight().bfloat16()).float()
        return self._rescale(product.mul_(self.scale), None)

    def _fp32(self, x: Tensor) -> Tensor:
        return reference(x, self.plain_weight(), self.scale, self.bias)

    def _rescale(self, product: Tensor, row_scale: Tensor | None) -> Tensor:
        if row_scale is None:
            return product if self.bias is None else product.add_(self.bias.float())
        if self.bias is None:
            return product.mul_(row_scale)
        return torch.addcmul(self.bias.float(), product, row_scale, out=product)

    # ---- which of them ----------------------------------------------------------------------

    def _settle(self) -> None:
        """Fix the path where there is nothing to measure; where the wish cannot be met, say why."""
        wish, device = self.compute, self.weight.device.type
        self.path, self.reason = None, ""
        half = self.compute_dtype in (torch.bfloat16, torch.float16)
        weight_only: Path = "bf16" if half else "fp32"
        if wish in ("bf16", "fp32"):
            self.path = wish
        elif device == "cpu" and not has_int8_products():
            self.path, self.reason = weight_only, "this CPU has no int8 dot products"
        elif device == "cpu":
            self.path = None if wish == "auto" else wish
        elif wish == "int_mm" and (self.in_features % CUDA_MULTIPLE or self.out_features % CUDA_MULTIPLE):
            self.path, self.reason = "bf16", f"int8 products on {device} need sizes that are multiples of 8"
        elif wish == "int_mm":
            self.path = wish
        else:
            self.path = "bf16"
            self.reason = "oneDNN runs on a CPU only" if wish == "onednn" else ""

    def _measure(self, rows: Tensor) -> Path:
        """The faster of the two int8 products for this shape class, timed once a process.

        They agree bit for bit, so what the clock says changes no result.
        """
        if len(rows) == 0 or torch.compiler.is_compiling():
            return "int_mm"
        rows = rows[: self._height()]
        shape = (self.in_features, self.out_features, len(rows).bit_length(), torch.get_num_threads())
        if shape not in _fastest:
            q, _ = quantise_rows(rows)
            packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
            seconds = fastest_of(
                [
                    lambda: plain_product(q, self.weight, self.scale),
                    lambda: packed_product(q, packed, self.scale),
                ]
            )
            _fastest[shape] = "onednn" if seconds[0] > ADVANTAGE * seconds[1] else "int_mm"
        self.path = _fastest[shape]
        return self.path

    # ---- the form of the weights ------------------------------------------------------------

    @property
    def packed(self) -> bool:
        """Whether `weight` is in oneDNN's layout."""
        return self.weight.is_mkldnn

    def pack(self) -> None:
        """Put the weights into oneDNN's layout; the plain form is let go."""
        if not self.packed:
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)

    def plain_weight(self) -> Tensor:
        """int8 [out, in], also from the packed layout, which has no way back but a product with one."""
        if not self.packed:
            return self.weight
        one = torch.eye(self.in_features, dtype=torch.int8)
        ones = torch.ones(self.out_features)
        return packed_product(one, self.weight, ones).t().to(torch.int8).contiguous()

    def unpack(self) -> None:
        """Put the weights into the plain form."""
        self.weight = self.plain_weight()

    def nbytes(self) -> int:
        """Memory of weights, scales and bias as they lie, padding of the packed layout included."""
        weight = torch.ops.mkldnn._nbytes(self.weight) if self.packed else self.weight.untyped_storage().nbytes()
        rest = (t for t in (self.scale, self.bias) if t is not None)
        return weight + sum(t.numel() * t.element_size() for t in rest)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Int8Linear:
        self.unpack()
        scale = self.scale
        super()._apply(fn, recurse)
        # A module cast to bf16 must not round its scales.
        self.scale = scale.to(self.weight.device)
        self._settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__


def has_int8_products() -> bool:
    """Whether this CPU multiplies int8 natively; without it oneDNN's sums of pairs saturate in 16 bits."""
    probes = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def fastest_of(functions: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Least seconds of each function over interleaved rounds, after one call that does not count."""
    for function in functions:
        function()
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best
