"""What the plugins that hand evaluations to other networks have in common: their wrap and its report."""

from __future__ import annotations

from collections.abc import Sequence

from suite.diffusion.denoiser import Counter
from suite.network.experts import Expert
from suite.wrap import Wrap, WrapReport

UNIT = "evaluations handed to other networks"


def switching(experts: Sequence[Expert], reason: str) -> Wrap:
    """A wrap of experts; what it reports are the evaluations since the last report.

    Args:
        experts: with tallies of their own.
        reason: why nothing was handed over, if nothing was.
    """

    def report() -> WrapReport:
        facts = {
            "models": [
                {
                    "name": e.companion.name,
                    "sha256": e.companion.hash,
                    "nfe": e.tally.nfe,
                    "depth": e.tally.depth,
                    "network_bytes": e.companion.network.bytes(),
                }
                for e in experts
            ]
        }
        did = sum(e.tally.depth for e in experts)
        for e in experts:
            e.tally.clear()
        return WrapReport(did, UNIT, facts, "" if did else reason)

    return Wrap(report=report, experts=tuple(experts))


def tally() -> Counter:
    """A fresh tally."""
    return Counter()
