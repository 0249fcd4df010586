"""`Wrap`: what compress, parallelize and cache return, and how the host puts several of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from suite.denoiser import Denoiser
    from suite.experts import Expert
    from suite.guidance import Guidance
    from suite.sampler import Sampler


@dataclass(frozen=True)
class WrapReport:
    """What a wrap did in one run.

    Attributes:
        did: how often it acted (calls reused, layers replaced, evaluations moved); 0 means nothing.
        what: the unit of `did`, e.g. "block calls reused".
        facts: further numbers, JSON-able.
        reason: why nothing was done, when `did` is 0.
    """

    did: int
    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Wrap:
    """Up to four parts, all optional; the host folds them in the order of the recipe.

    Attributes:
        network: module -> module. Patch forwards with `suite.patch.Patches`; do not change weights in
            place unless the plugin declares the word `weights`.
        denoiser: Denoiser -> Denoiser, below guidance: it sees the branches in `call`.
        guidance: Guidance -> Guidance: `dataclasses.replace` what the run asked for, e.g. end it after a share of the
            steps. All wraps' are applied before the guided denoiser is made.
        experts: other networks that answer some of the calls, asked in this order; see `suite.experts`.
        sampler: Sampler -> Sampler: the loop from the prior to x0.
        report: called after the run.
        undo: puts the module back, bit for bit; None if there is nothing to put back.
    """

    report: Callable[[], WrapReport]
    network: Callable[[nn.Module], nn.Module] | None = None
    denoiser: Callable[[Denoiser], Denoiser] | None = None
    guidance: Callable[[Guidance], Guidance] | None = None
    experts: tuple[Expert, ...] = ()
    sampler: Callable[[Sampler], Sampler] | None = None
    undo: Callable[[], None] | None = None
