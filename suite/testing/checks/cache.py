"""Checks of the hook `cache`."""

from __future__ import annotations

from suite.testing.checks.subject import Subject, of
from suite.testing.checks.wrap import under


@of("cache")
def check_cache_reports_its_reuse(subject: Subject) -> None:
    """Hits, misses, the share that did not run, bytes, and an estimate of the error or None; see `suite.wrap.reuse`."""
    report = under(subject, "cache").generate((0,)).report
    if report is None or report.did == 0:
        return
    facts = report.facts
    for name in ("hits", "misses", "bytes_held"):
        value = facts.get(name)
        assert type(value) is int and value >= 0, f"{name} = {value!r}: expected a count; see suite.wrap.reuse"
    share, error = facts.get("skipped_share"), facts.get("error_estimate", "missing")
    assert isinstance(share, float) and 0 <= share <= 1, f"skipped_share = {share!r}: expected a share, 0 to 1"
    assert error is None or (isinstance(error, float) and error >= 0), f"error_estimate = {error!r}: or None"


@of("cache")
def check_cache_says_what_it_holds(subject: Subject) -> None:
    """`held` is at most what the report calls `bytes_held`, is needed to hold anything, and is 0 after the run."""
    wrap = (wrapped := under(subject, "cache")).wrap
    if wrap is None:
        return
    outcome = wrapped.generate((0,))
    if outcome.report is None or outcome.report.did == 0:
        return
    assert wrap.held is not None, "it does not say what it keeps: give its Wrap `held`, for the host's limit"
    now, most = wrap.held(), outcome.report.facts.get("bytes_held", 0)
    assert 0 <= now <= most, f"held() = {now}, but the report's bytes_held = {most}"
    if wrap.undo:
        wrap.undo()
    assert wrap.held() == 0, f"held() = {wrap.held()} after the run: let go in `undo`"
    assert wrap.report() == outcome.report, "the report changes when the run is undone, after which it is asked for"
