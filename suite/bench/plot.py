"""Plots of what was measured; needs matplotlib, the extra `bench`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from suite.bench.record import Record
from suite.files.output import write

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c564b")  # Okabe and Ito
DASHES = ("-", "--", ":", "-.")
MARKS = "osD^vP*Xph<>"
COLUMNS = 4


def solvers(record: Record) -> None:
    """FOLDER/solvers.png: a panel for each grid, a line for each solver, error over evaluations."""
    rows = [row for row in record.rows if row["error"] is not None and row["error"] > 0]
    if not rows:
        return
    grids = list(dict.fromkeys(row["schedule"] for row in rows))
    methods = list(dict.fromkeys(row["solver"] for row in rows))
    columns = min(COLUMNS, len(grids))
    lines = math.ceil(len(grids) / columns)
    figure = Figure(figsize=(3.1 * columns + 1.8, 2.8 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axis, grid in zip(axes, grids, strict=False):
        for number, method in enumerate(methods):
            points = sorted(
                (row["evaluations"], row["error"], row["stderr"] or 0.0)
                for row in rows
                if (row["schedule"], row["solver"]) == (grid, method)
            )
            if points:
                x, y, spread = zip(*points, strict=True)
                look = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % 4]}
                line = axis.errorbar(x, y, spread, marker="o", markersize=2.5, linewidth=1.1, elinewidth=0.6, **look)
                handles.setdefault(method, line)
        _logarithmic(axis, sorted({row["budget"] for row in rows}), rows)
        axis.set_title(grid, fontsize=9)
    for number, axis in enumerate(axes):
        axis.set_visible(number < len(grids))
        axis.tick_params(labelbottom=number + columns >= len(grids))  # the last of its column
    figure.supxlabel("evaluations of the denoiser", fontsize=9)
    figure.supylabel("relative error of x0", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    request = record.request
    figure.suptitle(
        f"{request['model']}, guidance {request['guidance']:g}, {len(request['seeds'])} samples", fontsize=10
    )
    _save(record, figure)


def _logarithmic(axis: Axes, ticks: Sequence[int], rows: Sequence[dict[str, Any]]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    # Given, because there may be one number alone, and bars that reach below 0 would take the axis with them.
    for limit, key, margin in ((axis.set_xlim, "evaluations", 1.1), (axis.set_ylim, "error", 1.5)):
        values = [row[key] for row in rows]
        limit(min(values) / margin, max(values) * margin)
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(_plain))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(_plain))
    axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.tick_params(labelsize=8)


def _plain(value: float, position: object) -> str:
    del position
    return f"{value:g}"


def _save(record: Record, figure: Figure) -> None:
    # Without the library's version in it, equal numbers give equal files.
    write(record.beside(".png"), lambda file: figure.savefig(file, dpi=130, metadata={"Software": None}))


def caches(record: Record) -> None:
    """FOLDER/caches.png: a panel for each number of steps; error over time, with the line of fewer steps."""
    if not any("ratio" in row for row in record.rows):
        return
    counts = sorted({row["steps"] for row in record.rows}, reverse=True)
    names = list(dict.fromkeys(row["cache"].partition(":")[0] for row in record.rows if row["cache"]))
    figure = Figure(figsize=(3.6 * len(counts) + 1.8, 3.3), layout="constrained")
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axis, steps in zip(axes, counts, strict=True):
        rows = [r for r in record.rows if r["steps"] == steps and r["error"] and "ratio" in r]
        line = sorted((r["ratio"], r["error"], r["run_steps"]) for r in rows if not r["cache"])
        if line:
            x, y, _ = zip(*line, strict=True)
            (handles["fewer steps"],) = axis.plot(x, y, color="#444444", marker="|", linewidth=1.1)
            for at, error, run in line[:: max(1, len(line) // 4)]:
                axis.annotate(f"{run}", (at, error), textcoords="offset points", xytext=(2, 4), fontsize=7)
        for number, name in enumerate(names):
            points = sorted((r["ratio"], r["error"]) for r in rows if r["cache"].partition(":")[0] == name)
            if points:
                x, y = zip(*points, strict=True)
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
                (handles[name],) = axis.plot(x, y, linewidth=0.8, markersize=5, **look)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(_plain))
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{steps} steps", fontsize=9)
    figure.supxlabel("time, as a share of the run without a cache", fontsize=9)
    figure.supylabel("relative error of x0", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(
        f"{record.request['model']}, {record.request['solver']} on {record.request['schedule']}", fontsize=10
    )
    _save(record, figure)
