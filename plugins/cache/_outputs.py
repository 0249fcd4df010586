"""What static caches share: which steps compute, and what is kept of them for the steps that do not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import ceil, copysign, floor
from typing import Any

from suite.call import active_call, first_steps
from suite.plugins.cache._shared import size
from suite.wrap import reuse

#: (step, steps) -> the oldest step whose output may be reused at `step`; `step` itself means that it is computed.
Anchor = Callable[[int, int], int]


def every(interval: int, last: int = 0) -> Anchor:
    """Compute the steps 0, N, 2N, ... and the `last` ones."""

    def anchor(step: int, steps: int) -> int:
        return step if step >= steps - last else step - step % interval

    return anchor


def within(interval: int, start: float, end: float) -> Anchor:
    """Compute the multiples of N, and every step outside of the shares [start, end] of the run.

    What is reused is the newest output that was computed: the step before the window counts too.
    """

    def anchor(step: int, steps: int) -> int:
        first, stop = first_steps(start, steps), first_steps(end, steps)
        if not first <= step < stop:
            return step
        return max(step - step % interval, first - 1)

    return anchor


def centred(interval: int, center: float, power: float) -> Anchor:
    """Compute as many steps as `every` does, dense about the share `center` of the run (DeepCache, equation 9)."""

    def anchor(step: int, steps: int) -> int:
        full = full_steps(steps, interval, center, power)
        return full[bisect_right(full, step) - 1]

    return anchor


@cache
def full_steps(steps: int, interval: int, center: float, power: float) -> tuple[int, ...]:
    """k = ceil(steps / interval) steps: sign(l)|l|^p + c at even l between -c^(1/p) and (steps - c)^(1/p).

    The first is step 0. Where neighbours round to one step the power is lowered, as the authors do, until all
    differ; a power of 1 is an even spacing, for which they do.
    """
    count, c = ceil(steps / interval), center * steps
    while True:
        low, high = -(c ** (1 / power)), (steps - c) ** (1 / power)
        lines = (low + i * (high - low) / count for i in range(count))
        # c^(1/p) to the power p is c but for rounding.
        found = {max(0, floor(copysign(abs(line) ** power, line) + c + 1e-9)) for line in lines}
        if len(found) == count:
            return tuple(sorted(found))
        power = max(1.0, power - 0.02)


@dataclass
class Kept:
    """An output and the step at which it was computed."""

    step: int
    output: Any


@dataclass
class Outputs:
    """Outputs of one run by part, and by branch and evaluation; what to do is decided from the active call alone."""

    kept: dict[str, dict[tuple[str, int], Kept]] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    held: int = 0
    peak: int = 0

    def find(self, part: str, anchor: Anchor) -> Kept | None:
        """What this call reuses; None if it must compute.

        An output older than the anchor counts as nothing stored: a branch may come back after steps without it,
        as guidance in an interval does, and a second evaluation is missing from some steps.
        """
        call = active_call()
        since = anchor(call.step, call.steps)
        kept = self.kept.get(part, {}).get((call.branch, call.evaluation))
        if since >= call.step or kept is None or kept.step < since:
            self.forget(part, since)
            self.computed += 1
            return None
        self.reused += 1
        return kept

    def keep(self, part: str, anchor: Anchor, output: Any) -> None:
        """Store what this call computed, if the next step will reuse it."""
        call = active_call()
        following = call.step + 1
        if following < call.steps and anchor(following, call.steps) <= call.step:
            self.kept.setdefault(part, {})[call.branch, call.evaluation] = Kept(call.step, output)
            self.held += size(output)
            self.peak = max(self.peak, self.held)

    def forget(self, part: str, since: int) -> None:
        """Drop what this call is about to replace, and what is older than `since`, before anything new is held."""
        call, mine = active_call(), self.kept.get(part, {})
        key = (call.branch, call.evaluation)
        for stale in [k for k, v in mine.items() if k == key or v.step < since]:
            self.held -= size(mine.pop(stale).output)

    def cached(self, part: str, anchor: Anchor, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for `forward`."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            kept = self.find(part, anchor)
            if kept is not None:
                return kept.output
            output = forward(*args, **kwargs)
            self.keep(part, anchor, output)
            return output

        return answer

    def facts(self) -> dict[str, Any]:
        """For the report."""
        share = self.reused / max(1, self.computed + self.reused)
        return reuse(hits=self.reused, misses=self.computed, skipped_share=share, bytes_held=self.peak)

    def clear(self) -> None:
        """Forget everything that is kept."""
        self.kept.clear()
        self.held = 0
