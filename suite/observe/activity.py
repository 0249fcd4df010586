"""Which blocks of a network really ran at which step: seen below every wrap, so what a cache skips is not in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suite.call import active_call
from suite.network import BlockRef, Network
from suite.network.patch import Patches
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser

SAME = 1e-9
LAYER = "layer"


@dataclass
class Activity:
    """One run, watched.

    A step is known by the time at which it ends, because whoever begins in the middle counts its steps from there.

    Attributes:
        refs: the parts that are watched.
        times: steps + 1 of the run's grid.
        asked: rows that guidance asked for, by step.
        ran: numbers that reached each part (of its first argument, so rows times places), by step.
    """

    refs: Sequence[BlockRef]
    times: Sequence[float]
    asked: list[int] = field(init=False)
    ran: dict[str, list[int]] = field(init=False)
    patches: Patches = field(default_factory=Patches)

    def __post_init__(self) -> None:
        steps = len(self.times) - 1
        self.asked, self.ran = [0] * steps, {ref.name: [0] * steps for ref in self.refs}

    @staticmethod
    def of(network: Network, times: Sequence[float]) -> Activity:
        """For all parts of a network that the host knows, and its linear and convolution layers."""
        blocks = network.blocks()
        known = {id(ref.module) for ref in blocks}
        layers = {id(part): BlockRef(name, part, LAYER) for name, part in network.layers() if id(part) not in known}
        return Activity((*blocks, *layers.values()), times)

    def step(self, call: Call) -> int | None:
        """The step of the grid that this call belongs to; None if it is of none."""
        for step, end in enumerate(self.times[1:]):
            if abs(end - call.next_t) <= SAME:
                return step
        return None

    def install(self) -> None:
        """Before any cache replaces a forward."""
        for ref in self.refs:
            self.patches.replace(ref.module, lambda forward, name=ref.name: self._seen(name, forward))

    def undo(self) -> None:
        """After every cache has put its forwards back."""
        self.patches.undo()

    def _seen(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            # Counted when it returns: TeaCache begins a block for its first lines alone.
            if (step := self.step(active_call())) is not None:
                first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                self.ran[name][step] += 1 if first is None else first.numel()
            return out

        return run

    def wrap(self) -> Wrap:
        """Counts what guidance asks for; the outermost denoiser."""
        return Wrap(report=lambda: WrapReport(0, "", reason="it looks"), denoiser=lambda inner: _Asked(inner, self))

    def facts(self) -> dict[str, Any]:
        """For the report: `asked` rows by step, and of each part that ever ran how much of these reached it.

        Parts see different numbers for a row: attention within a frame sees each frame. So a part's share is of the
        most that it saw at a step for a row asked for. Layers that something else calls by their weights are left out.
        """
        parts = []
        for ref in self.refs:
            each = [n / rows if rows else 0.0 for n, rows in zip(self.ran[ref.name], self.asked, strict=True)]
            most = max(each, default=0.0)
            if most:
                computed = [round(share / most, 4) for share in each]
                parts.append({"name": ref.name, "kind": ref.kind, "computed": computed})
        return {"times": list(self.times), "asked": self.asked, "parts": parts}


@dataclass(frozen=True)
class _Asked:
    """A Denoiser around another one."""

    inner: Denoiser
    activity: Activity

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        step = self.activity.step(call)
        if step is not None:
            self.activity.asked[step] += x.shape[0]
        return self.inner.denoise(x, t, cond, call)
