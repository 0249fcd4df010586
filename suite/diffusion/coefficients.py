"""Coefficients of a step: float64 functions of times alone, so a run on a known grid looks them up.

A step is a linear combination of tensors. Its coefficients cost a dozen operations on scalars, which for a small
network at batch 1 is more than the combination itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plugins' modules import this one, and must load without torch
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule

    #: A float where all samples share the time, else a tensor [B] or [B, groups].
    Coefficient = float | Tensor

REMEMBERED = 8192
#: How far from 1 a sum of two coefficients may be by rounding alone; a float32 state does not see it.
TO_ROUNDING = 1e-15


def of_times(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Coefficient, ...]]:
    """Turn `(noise, *times) -> float64 tensors` into a function that remembers its values at scalar times.

    It then returns floats; at times of shape [B] or [B, groups] it computes tensors of that shape every time.
    A plain number among the times, such as DDIM's eta, is an argument like any other.
    """

    @lru_cache(REMEMBERED)
    def remembered(noise: NoiseSchedule, *times: float) -> tuple[float, ...]:
        import torch

        scalars = (torch.tensor(t, dtype=torch.float64) for t in times)
        return tuple(float(c) for c in function(noise, *scalars))

    @wraps(function)
    def coefficients(noise: NoiseSchedule, *times: Tensor | float) -> tuple[Coefficient, ...]:
        for t in times:  # a generator in any() costs more than the look-up
            if getattr(t, "ndim", 0):
                return function(noise, *times)
        return remembered(noise, *map(float, times))

    return coefficients


def expand(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape [], [B] or [B, groups] ready to multiply x, in x's dtype and on its device.

    A scalar stays on the CPU: torch multiplies it in without a copy to the device or a synchronisation.
    """
    if value.ndim == 0:
        return value.to(x.dtype)
    value = value.to(x)
    return value.reshape(*value.shape, *[1] * (x.ndim - value.ndim))


def combine(coefficients: Sequence[Coefficient], tensors: Sequence[Tensor]) -> Tensor:
    """sum_i coefficients[i] * tensors[i], in the tensors' dtype and on their device.

    Each operation reads and writes tensors of the state's size, and that is what a step costs. Two terms whose
    coefficients add up to 1, as Euler's of a flow do, are one operation instead of two, and so are a term with
    coefficient 1 and the one after it.
    """
    if len(coefficients) != len(tensors) or not tensors:
        raise ValueError(f"combine: {len(coefficients)} coefficients for {len(tensors)} tensors")
    a, x, used = coefficients[0], tensors[0], 1
    if not isinstance(a, (int, float)):
        out = expand(a, x) * x
    elif len(tensors) > 1 and isinstance(b := coefficients[1], (int, float)) and x.dtype == tensors[1].dtype:
        if len(tensors) == 2 and abs(a + b - 1) < TO_ROUNDING:
            return tensors[1].lerp(x, a)
        out, used = (x.add(tensors[1], alpha=b), 2) if a == 1 else (x * a, 1)
    else:
        out = x * a
    # `out` is this function's own: adding in place saves an allocation of the state's size a term.
    for value, x in zip(coefficients[used:], tensors[used:], strict=True):
        if isinstance(value, (int, float)):
            out.add_(x, alpha=value)
        else:
            out.add_(expand(value, x) * x)
    return out
