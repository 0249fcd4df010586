"""Guidance: a Denoiser made of several branches of another one. It acts on x0, which is the same as on epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suite.call import JOIN, Call, first_steps
from suite.diffusion.denoiser import Cond, Denoiser, concatenate
from suite.errors import ConfigError

#: A step at an end of the interval is inside, whatever the last bit of its time says: 0.3 of a grid is 0.3 + 5e-17.
AT_END = 1e-9


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022) in an interval (Kynkaanniemi 2024).

    x0 = x0_uncond + scale (x0_cond - x0_uncond) for interval[0] <= t <= interval[1] in the first `share` of the
    steps, else x0_cond. scale = 1 is no guidance, and evaluates the conditional branch alone.

    Attributes:
        scale: guidance scale.
        interval: times between which it acts, both included.
        batched: send both branches as one batch (one call) or as two calls.
        tokens: x0 is probabilities of tokens: the branches are combined as logarithms and normalised, so that what
            comes out are probabilities too (Schiff 2024, 2412.10193).
        share: share of the run's steps, from the first on, in which it acts.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    batched: bool = True
    tokens: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance {self.scale}: expected a number, e.g. 3; 1 is no guidance")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance interval {self.interval}: expected two increasing times in [0, 1]")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"guidance share {self.share}: expected a share of the steps in [0, 1]")

    def branches(self, call: Call) -> tuple[str, ...]:
        """The branches that are evaluated in this call."""
        low, high = self.interval
        inside = low - AT_END <= call.t <= high + AT_END
        acts = self.scale != 1 and inside and call.step < first_steps(self.share, call.steps)
        return ("cond", "uncond") if acts else ("cond",)

    def wrap(self, inner: Denoiser) -> GuidedDenoiser:
        """The guided denoiser; its conditioning is a mapping from branch to that branch's conditioning."""
        return GuidedDenoiser(self, inner)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A Denoiser whose `cond` maps branch names to conditionings."""

    guidance: Guidance
    inner: Denoiser
    #: The last joined conditioning and what it was joined from: it is the same at every step of a run.
    _joined: dict[tuple[str, ...], tuple[Mapping[str, Cond], Cond]] = field(default_factory=dict, repr=False)

    def denoise(self, x: Tensor, t: Tensor, cond: Mapping[str, Cond], call: Call) -> Tensor:
        branches = self.guidance.branches(call)
        if len(branches) == 1:
            return self.inner.denoise(x, t, cond["cond"], call.on("cond", together="cond"))
        together = JOIN.join(branches)
        if self.guidance.batched:
            both = torch.cat([x] * len(branches))
            times = t if t.ndim == 0 else torch.cat([t] * len(branches))
            joined = self._join(branches, cond)
            out = self.inner.denoise(both, times, joined, call.on(*branches, together=together))
            conditional, unconditional = out.chunk(2)
        else:
            conditional, unconditional = (
                self.inner.denoise(x, t, cond[b], call.on(b, together=together)) for b in branches
            )
        if self.guidance.tokens:
            return _of_tokens(conditional, unconditional, self.guidance.scale)
        return torch.lerp(unconditional, conditional, self.guidance.scale)

    def _join(self, branches: tuple[str, ...], cond: Mapping[str, Cond]) -> Cond:
        known = self._joined.get(branches)
        if known is None or known[0] is not cond:
            known = self._joined[branches] = (cond, concatenate([cond[b] for b in branches]))
        return known[1]


def _of_tokens(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """p_uncond (p_cond / p_uncond)^scale, normalised; what the condition rules out stays at 0."""
    tiny = torch.finfo(conditional.dtype).tiny
    c, u = conditional.clamp(min=tiny).log(), unconditional.clamp(min=tiny).log()
    combined = (u + scale * (c - u)).masked_fill(conditional == 0, -torch.inf)
    return combined.softmax(-1)
