"""Lower orders in the last steps of a run, which diffusers calls `lower_order_final`.

With s steps left a multistep method goes through at most s evaluations, so the step before the last is of second
order and the last of first. Steps to clean data are of first order anyway; see `_exponential.is_regular`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: A run of fewer steps is short: there DPM-Solver's and DEIS' schedulers lower the order.
SHORT = 15


def steps_left(times: Tensor, wanted: bool, short: int | None = None) -> int | None:
    """Steps of a grid if its last ones are to be of lower order, else None.

    Args:
        wanted: the option of the plugin.
        short: grids of so many steps and more are left as they are.
    """
    steps = times.shape[0] - 1
    return steps if wanted and (short is None or steps < short) else None


def limited(order: int, left: int | None) -> int:
    """The order of a step, with so many steps left, this one included; None is no limit."""
    return order if left is None else min(order, max(1, left))


def one_less(left: int | None) -> int | None:
    """The steps left after this one."""
    return None if left is None else left - 1
