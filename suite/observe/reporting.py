"""The report of a run, put together from what its parts tell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from suite.diffusion.sampler import Problem
from suite.diffusion.start import Init
from suite.errors import NoOpError, PluginError
from suite.hookspecs import SINGLE
from suite.host.manager import Active
from suite.observe.attribution import attributed
from suite.observe.report import PluginReport
from suite.run import Run
from suite.wrap import Wrap, WrapReport


def plugin_reports(actives: Sequence[Active], wraps: Mapping[int, Wrap | None], allow_noop: bool) -> list[PluginReport]:
    """What every plugin did; `wraps` by the id of its `Active`.

    Raises:
        NoOpError: one of them did nothing, unless that is allowed.
        PluginError: one of them cannot say what it did.
    """
    out = []
    for a in actives:
        report = _told(a, w, actives) if (w := wraps.get(id(a))) else None
        acts = a.hook not in SINGLE
        if acts and (report is None or report.did == 0) and not allow_noop:
            reason = report.reason if report and report.reason else "it found nothing to do"
            raise NoOpError(f"plugin {a.text} did nothing: {reason}; drop it, or pass --allow-noop")
        out.append(
            PluginReport(
                a.text,
                a.hook,
                a.entry.distribution,
                a.entry.version,
                None if a.hook in SINGLE else bool(a.plugin.lossless),
                report.did if report else None,
                report.what if report else "",
                dict(report.facts) if report else {},
            )
        )
    return out


def _told(active: Active, wrap: Wrap, actives: Sequence[Active]) -> WrapReport:
    with attributed(active, "report", actives):
        report = wrap.report()
    if not isinstance(report, WrapReport):
        raise PluginError(f"plugin {active.entry.origin}: its report is {type(report).__name__}, expected a WrapReport")
    return report


def started(init: Init, run: Run, problem: Problem) -> dict[str, Any]:
    """What the report says of a file that a run began with."""
    return {
        "init": init.name,
        "sha256": init.sha256,
        "strength": init.strength,
        "time": float(problem.times[0].max()),
        "steps": problem.run.steps,
        "of": run.steps,
    }


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
