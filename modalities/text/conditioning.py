"""Self-conditioning: what one run of the continuous family keeps between evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond, Denoiser


@dataclass(frozen=True)
class SelfConditioned:
    """A denoiser that is shown its own last estimate (Chen 2022, Analog Bits), each branch its own.

    Attributes:
        inner: takes the estimate as `before` in its conditioning; none at the first evaluation.
        start: embeddings [S, D] of tokens that are given: every estimate begins with them, so the text does.
    """

    inner: Denoiser
    start: Tensor
    _last: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        count = x.shape[0] // len(call.branches)
        # A branch that is new while others are not (guidance in an interval) starts from nothing.
        empty = x.new_zeros(count, *x.shape[1:])
        before = torch.cat([self._last.get((call.run_id, b), empty) for b in call.branches])
        out = self.inner.denoise(x, t, {**cond, "before": before}, call)
        if len(self.start):
            out = torch.cat([self.start.to(out).expand(len(out), -1, -1), out[:, len(self.start) :]], dim=1)
        # By run too: parts of a batch may be run one after the other.
        self._last.update({(call.run_id, b): o for b, o in zip(call.branches, out.split(count), strict=True)})
        return out
