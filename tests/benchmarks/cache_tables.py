"""The tables of docs/benchmarks/caches-quality.md from what `suite bench caches` wrote.

    python tests/benchmarks/cache_tables.py QUALITY [TIMES]

QUALITY is the folder of a run with `--rounds 0 --metric`, TIMES that of a run with rounds, of the same modality
and steps.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.host.discovery import MODALITIES, find, installed

REPEATING = ("nirvana", "redi")
"""They were timed on requests that repeat."""
NOT_BLOCKS = (*REPEATING, "text-kv")
"""What they skip is no share of the blocks."""
EXACT = 1e-4


def rows_of(folder: str) -> tuple[str, list[dict[str, Any]]]:
    """The modality and all rows of a record."""
    record = json.loads((Path(folder) / "caches.json").read_text())
    return record["request"]["modality"], record["rows"]


def error_of(steps: int, curve: Sequence[tuple[int, float]]) -> float:
    """Error of so many steps without a cache: log-linear between those measured, and on beyond the ends."""
    k = min(max(1, sum(n < steps for n, _ in curve)), len(curve) - 1)
    (a, low), (b, high) = curve[k - 1], curve[k]
    share = math.log(steps / a) / math.log(b / a)
    return low * (high / low) ** share


def main(quality: str, times: str = "") -> None:
    modality, rows = rows_of(quality)
    timed = {(r["cache"], r["run_steps"]): r for r in (rows_of(times)[1] if times else ()) if "ratio" in r}
    headline = find(modality, installed(MODALITIES), "modality").load().headline
    steps, base = rows[0]["steps"], rows[0]["metrics"]  # the run without a cache comes first
    curve = sorted((r["run_steps"], r["error"]) for r in rows if not r["cache"] and r["error"])
    columns = ["", "times faster", "skipped", "error", "instead, same time", "gain", *headline]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in sorted(rows, key=lambda r: math.inf if r["error"] is None else r["error"]):
        name, plain, other = row["cache"], row is rows[0], row.get("other_seeds")
        label = f"`{name}`" if name else "none" if plain else "other seeds" if other else f"*{row['run_steps']} steps*"
        cells = [label, "1" if plain else "", "", "" if other else f"{row['error']:.3f}", "", ""]
        time = None if plain or other or name in REPEATING else timed.get((name, row["run_steps"]))
        if time:
            cells[1] = f"{1 / time['ratio']:.2f}"
            fewer = time.get("same_time_steps") or steps
            if name and fewer < steps and row["error"] > EXACT:
                instead = error_of(fewer, curve)
                cells[4:] = f"{fewer} steps: {instead:.3f}", f"{instead / row['error']:.2f}"
        if name not in NOT_BLOCKS and row.get("skipped_share") is not None:
            cells[2] = f"{row['skipped_share']:.0%}"
        for metric, sign in headline.items():
            value = row["metrics"][metric]
            better = 100 * sign * (value - base[metric]) / abs(base[metric]) + 0.0
            cells.append(f"{value:.4g}" + ("" if plain else f" ({better:+.1f} %)"))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
