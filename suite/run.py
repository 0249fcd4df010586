"""`Run`: the frozen facts of one run, the same object for every hook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What is being generated and on what.

    Attributes:
        modality: entry-point name, e.g. `image`.
        model: name or folder of the model.
        device: torch device string.
        dtype: dtype the network computes in, `fp32` or `bf16`; the state x is float32 always.
        steps: number of solver steps.
        batch: samples generated at once.
        seeds: one a sample.
        guidance: scale; 1 means none.
        guidance_interval: times (low, high) between which guidance acts.
        world: number of ranks.
        tokens: positions of one sample that the network attends over; 0 where the modality does not say.
        mode: the engine's driver, `sample` or `distill`.
        facts: what the modality adds (latent layout, frames, ...), read-only.
        run_id: new for every run.
        stamp: what the numbers of a run depend on besides its request: a digest of the weights and of everything in
            the recipe that acts, plugins that store trajectories left out. For whatever is kept across runs.
    """

    modality: str
    model: str
    device: str = "cpu"
    dtype: str = "fp32"
    steps: int = 50
    batch: int = 1
    seeds: tuple[int, ...] = (0,)
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    world: int = 1
    tokens: int = 0
    mode: str = "sample"
    facts: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = ""
    stamp: str = ""
