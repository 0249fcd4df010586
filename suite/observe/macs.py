"""Multiply-accumulates that really ran: counted at the operators, so what a cache skips is not in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def _int_mm(a: Shape, b: Shape, *rest: Any, **more: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **more: Any) -> int:
    *batch, queries, width = query
    return 2 * prod(batch) * queries * key[-2] * (width + value[-1])


def _linear(x: Shape, *rest: Any, out_shape: Shape, **more: Any) -> int:
    return 2 * prod(x) * out_shape[-1]


def _formulas() -> dict[Any, Callable[..., int]]:
    """What torch's own counter has no formula for: int8 products and the CPU's attention."""
    formulas = {
        torch.ops.aten._int_mm: _int_mm,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    if hasattr(torch.ops.onednn, "qlinear_pointwise"):
        formulas[torch.ops.onednn.qlinear_pointwise] = _linear
    return formulas


@contextmanager
def counting() -> Iterator[Callable[[], float]]:
    """Count the multiply-accumulates of matrix products, convolutions and attention in the block.

    Every operator passes through Python meanwhile, so the block's wall-clock says nothing.

    Yields:
        A function that returns the count so far.
    """
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as mode:
        yield lambda: mode.get_total_flops() / 2
