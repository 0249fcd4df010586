"""What a request to a modality that distills may choose. No torch here: flags and refusals must be quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suite.request import RequestOption

METHODS = ("sds", "vsd", "ism")
ITERATIONS_A_STEP = 25
"""Iterations of a run for each of the recipe's steps, which say how much effort is wanted."""

#: What a request to a modality that distills may choose; the modality lists them among its `options`.
OPTIONS: tuple[RequestOption, ...] = (
    RequestOption("distill", str, "The gradient: score distillation.", default="sds", choices=METHODS),
    RequestOption("iterations", int, "Steps of the optimiser; 25 a recipe step.", low=1, high=100_000),
    RequestOption("views", int, "Views rendered in each iteration.", default=2, low=1, high=64),
    RequestOption("target-steps", int, "Solver steps from noise to the teacher's target.", default=1, low=1, high=64),
    RequestOption("checkpoint", str, "File that keeps the state; a run goes on from it if it exists.", path=True),
)


def iterations(steps: int, options: Mapping[str, Any]) -> int:
    """Iterations of a run: as asked, or in proportion to the recipe's steps."""
    asked = options.get("iterations")
    return steps * ITERATIONS_A_STEP if asked is None else int(asked)
