"""Unchanged tokens: the same question to a network that is not told the time has the same answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.cache._shared import size
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.network import Network
    from suite.run import Run

UNIT = "evaluations of a row answered from memory"


@dataclass
class _Last:
    """What one branch was asked last, and the answer; one row a sample."""

    x: Tensor
    cond: Cond
    answer: Tensor


@dataclass
class _Memory:
    last: dict[str, _Last] = field(default_factory=dict)
    asked: int = 0
    reused: int = 0
    peak: int = 0

    def held(self) -> int:
        return sum(size((m.x, m.answer)) for m in self.last.values())

    def report(self) -> WrapReport:
        facts = reuse(
            hits=self.reused,
            misses=self.asked - self.reused,
            skipped_share=self.reused / max(1, self.asked),
            bytes_held=self.peak,
        )
        reason = "" if self.reused else "every row changed at every step; take more steps, or drop --cache unchanged"
        return WrapReport(self.reused, UNIT, facts, reason)


@dataclass(frozen=True)
class _Remembering:
    """A Denoiser in front of another one."""

    inner: Denoiser
    memory: _Memory

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        import torch

        from suite.diffusion.denoiser import chosen

        memory, last = self.memory, self.memory.last.get(call.key)
        memory.asked += x.shape[0]
        if last is None or last.x.shape != x.shape or not _same(last.cond, cond):
            answer = self.inner.denoise(x, t, cond, call)
        else:
            changed = (x != last.x).flatten(1).any(1).nonzero()[:, 0]
            memory.reused += x.shape[0] - len(changed)
            if len(changed) == 0:
                return last.answer
            if len(changed) == x.shape[0]:
                answer = self.inner.denoise(x, t, cond, call)
            else:
                some = replace(call, share=call.share * len(changed) / x.shape[0])
                times = t if t.ndim == 0 else t[changed]
                fresh = self.inner.denoise(x[changed], times, chosen(cond, changed), some)
                answer = torch.index_copy(last.answer, 0, changed, fresh)
        memory.last[call.key] = _Last(x.clone(), cond, answer)
        memory.peak = max(memory.peak, memory.held())
        return answer


def _same(a: Cond, b: Cond) -> bool:
    return a is b or (a.keys() == b.keys() and all(a[k] is b[k] for k in a))


@dataclass(frozen=True)
class Unchanged(Plugin):
    """Sahoo 2024, section 4.1: if no token was uncovered in a step, the next evaluation is the last one's answer.

    Exact for a network that depends on its tokens and its prompt alone. A row of the batch that has not changed is
    left out of the evaluation, so a run of T steps over L tokens costs at most L evaluations, however large T.

    Raises:
        ConfigError: from the hook, if the network is told the time.
    """

    summary = "masked tokens: do not ask again about a text that has not changed; exact"
    paper = "MDLM (2406.07524), section 4.1, caching"
    lossless = True
    effects = frozenset({"needs-tokens", "exact-reuse", "dynamic-decision"})

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        if not network.timeless:
            raise ConfigError(
                f"unchanged reuses answers at other times, but {type(network.module).__name__} may depend on the time: "
                "its modality does not declare it timeless; drop --cache unchanged"
            )
        memory = _Memory()
        return Wrap(
            report=memory.report,
            denoiser=lambda inner: _Remembering(inner, memory),
            undo=memory.last.clear,
            held=memory.held,
        )
