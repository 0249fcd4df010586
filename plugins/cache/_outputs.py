"""What static caches share: which steps compute, and what is kept of them for the steps that do not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import ceil, copysign, floor
from typing import Any, NamedTuple

from suite.call import Call, active_call, first_steps
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
        if step % interval == 0:
            return step
        first = first_steps(start, steps)
        if not first <= step < first_steps(end, steps):
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


class Kept(NamedTuple):
    """An output, the step at which it was computed, and its bytes."""

    step: int
    output: Any
    bytes: int


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
        kept = self.kept.get(part, {}).get((call.key, call.evaluation))
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
            self._store(self.kept.setdefault(part, {}), call, output)

    def forget(self, part: str, since: int) -> None:
        """Drop what this call is about to replace, and what is older than `since`, before anything new is held."""
        call = active_call()
        self._drop(self.kept.get(part, {}), (call.key, call.evaluation), since)

    def _drop(self, mine: dict[tuple[str, int], Kept], key: tuple[str, int], since: int) -> None:
        for stale in [k for k, v in mine.items() if k == key or v.step < since]:
            self.held -= mine.pop(stale).bytes

    def _store(self, mine: dict[tuple[str, int], Kept], call: Call, output: Any) -> None:
        count = size(output)
        mine[call.key, call.evaluation] = Kept(call.step, output, count)
        self.held += count
        if self.held > self.peak:
            self.peak = self.held

    def cached(self, part: str, anchor: Anchor, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that answers for `forward`: `find`, and `keep` if that found nothing.

        Written out, because every part of a network passes through here at every evaluation.
        """
        mine = self.kept.setdefault(part, {})

        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            step, steps = call.step, call.steps
            key, since = (call.key, call.evaluation), anchor(step, steps)
            kept = mine.get(key)
            if since < step and kept is not None and kept.step >= since:
                self.reused += 1
                return kept.output
            self.computed += 1
            if mine:
                self._drop(mine, key, since)
            output = forward(*args, **kwargs)
            if step + 1 < steps and anchor(step + 1, steps) <= step:
                self._store(mine, call, output)
            return output

        return answer

    def facts(self) -> dict[str, Any]:
        """For the report."""
        share = self.reused / max(1, self.computed + self.reused)
        return reuse(hits=self.reused, misses=self.computed, skipped_share=share, bytes_held=self.peak)

    def clear(self) -> None:
        """Forget everything that is kept."""
        for mine in self.kept.values():
            mine.clear()
        self.held = 0
