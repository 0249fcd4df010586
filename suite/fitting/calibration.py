"""`Calibration`: recorded network inputs for plugins that need statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond


@dataclass(frozen=True)
class Record:
    """One evaluation as the network would see it: state, time, conditioning and call."""

    x: Tensor
    t: Tensor
    cond: Cond
    call: Call


@dataclass(frozen=True)
class Calibration:
    """Inputs on the very grid and solver of the run, made only when a plugin asks.

    Attributes:
        prompts: what is generated to record them.
        run: (prompts) -> records of one uncompressed run; the engine's own loop.
    """

    prompts: tuple[str, ...]
    run: Callable[[Sequence[str]], list[Record]]

    def records(self, count: int | None = None) -> list[Record]:
        """Records of a run over the first `count` prompts (all by default). Costs a full run."""
        return self.run(self.prompts[:count])
