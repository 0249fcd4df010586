"""The figure of `suite cache show`; needs matplotlib, the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from suite.files.output import write

COMPUTED = "#0072b2"
#: Where a part did not run, by what happened instead.
INSTEAD = {
    "reused": "#f0e442",
    "skipped": "#f0e442",
    "forecast": "#e69f00",
    "left out": "#d8d8d8",
    "not run": "#d8d8d8",
}


def draw(file: Path, title: str, instead: str, asked: Sequence[int], parts: Sequence[Mapping[str, Any]]) -> None:
    """A row a part, a column a step: dark where all of it was computed, light where nothing was, shades between.

    Args:
        file: .svg, .png or .pdf.
        title: above the figure.
        instead: what happened where a part did not run, one of `INSTEAD`.
        asked: rows that guidance asked for, by step; the first line shows them.
        parts: `name` and `computed`, a share for each step.
    """
    most = max(asked, default=0) or 1
    shares = [[n / most for n in asked], *[part["computed"] for part in parts]]
    names = ["rows asked for", *[part["name"] for part in parts]]
    figure = Figure(figsize=(6.4, 0.62 + 0.145 * len(names)), layout="constrained")
    axis = figure.subplots()
    colours = LinearSegmentedColormap.from_list("reuse", [INSTEAD[instead], COMPUTED])
    axis.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axis.set_yticks([row + 0.5 for row in range(len(names))], names, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("step", fontsize=7)
    steps = MaxNLocator(10, integer=True).tick_values(0, len(asked) - 1)
    inside = [int(s) for s in steps if 0 <= s < len(asked)]
    axis.set_xticks([s + 0.5 for s in inside], [str(s) for s in inside], fontsize=6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8)
    legend = [Patch(color=COMPUTED, label="computed"), Patch(color=INSTEAD[instead], label=instead)]
    axis.legend(handles=legend, fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    write(file, lambda temporary: _save(figure, temporary, file.suffix))


def _save(figure: Figure, file: Path, suffix: str) -> None:
    if suffix != ".png":
        figure.savefig(file, format=suffix.removeprefix("."), metadata={"Date": None} if suffix == ".svg" else None)
        return
    pixels = BytesIO()
    figure.savefig(pixels, format="png", dpi=110)
    # A few flat colours: a palette is a fifth of the size.
    Image.open(pixels).convert("RGB").quantize(32).save(file, format="png", optimize=True)
