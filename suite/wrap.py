"""`Wrap`: what compress, parallelize and cache return, and how the host puts several of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from suite.diffusion.denoiser import Denoiser
    from suite.diffusion.guidance import Guidance
    from suite.diffusion.sampler import Sampler
    from suite.network.experts import Expert


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


def reuse(
    *, hits: int, misses: int, skipped_share: float, bytes_held: int, error_estimate: float | None = None, **more: Any
) -> dict[str, Any]:
    """The facts that every cache reports, in one order, and those of its own.

    Args:
        hits: how often it was asked and gave what it kept, or left something out; in the unit of its own decisions
            (a part's call, a row of the batch, a step).
        misses: how often it was asked and the network computed.
        skipped_share: of the calls of the parts that it covers, those that did not run.
        bytes_held: the most that it held at once.
        error_estimate: what the method itself says of its error, relative to what is reused; None if it says nothing.
    """
    return {
        "hits": hits,
        "misses": misses,
        "skipped_share": skipped_share,
        "bytes_held": bytes_held,
        "error_estimate": error_estimate,
        **more,
    }


@dataclass(frozen=True)
class Wrap:
    """Up to four parts, all optional; the host folds them in the order of the recipe.

    Attributes:
        network: module -> module. Patch forwards with `suite.network.patch.Patches`; do not change weights in
            place unless the plugin declares the word `weights`.
        denoiser: Denoiser -> Denoiser, below guidance: it sees the branches in `call`.
        guidance: Guidance -> Guidance: `dataclasses.replace` what the run asked for, e.g. end it after a share of the
            steps. All wraps' are applied before the guided denoiser is made.
        experts: other networks that answer some of the calls, asked in this order; see `suite.network.experts`.
        sampler: Sampler -> Sampler: the loop from the prior to x0.
        report: called after the run.
        undo: puts the module back, bit for bit; None if there is nothing to put back.
        held: bytes that it keeps at present, for the host's limit; asked after every evaluation, so it must be cheap.
            A cache has it, and holds nothing after `undo`.
    """

    report: Callable[[], WrapReport]
    network: Callable[[nn.Module], nn.Module] | None = None
    denoiser: Callable[[Denoiser], Denoiser] | None = None
    guidance: Callable[[Guidance], Guidance] | None = None
    experts: tuple[Expert, ...] = ()
    sampler: Callable[[Sampler], Sampler] | None = None
    undo: Callable[[], None] | None = None
    held: Callable[[], int] | None = None
