"""Quality numbers of recipes: the modality's own metrics over its benchmark prompts, several seeds each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from suite.bench.record import Record
from suite.engine.engine import Engine


def measure(
    engine: Engine,
    recipe: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    record: Record,
    on_call: Callable[[str, int, int], None],
) -> None:
    """A row for each seed that is not in the record yet; sample k of a run has the seed `seed * 10**6 + k`.

    Runs of two seeds share no noise, so their spread is what chance does to a number of this many samples.
    """
    for seed in seeds:
        if record.find(recipe=recipe, seed=seed) is not None:
            continue
        artifacts, nfe = [], 0.0
        own = [seed * 10**6 + k for k in range(len(prompts))]
        for result in engine.stream(prompts, own, batch=batch):
            artifacts += result.artifacts
            nfe = result.report.nfe
            on_call(f"{recipe}, seed {seed}", len(artifacts), len(prompts))
        found = engine.modality.metrics(artifacts, prompts)
        record.rows.append({"recipe": recipe, "seed": seed, "nfe": nfe, "metrics": found})
        record.save()


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Each number's mean over the rows of one recipe, and its standard deviation; None for a single row."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    out = {}
    for name in names:
        values = [row["metrics"][name] for row in rows if name in row["metrics"]]
        out[name] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return out
