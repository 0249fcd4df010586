"""`suite cache show`: which blocks ran at which step of a run, and which were reused, from its report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from suite.errors import ConfigError
from suite.files.inputs import read_json
from suite.files.output import check_folder, check_names
from suite.files.printable import printable

SUFFIXES = (".svg", ".png", ".pdf")
#: By what share of a part's rows ran at a step, from none on.
SIGNS = ".-+#"
#: A word of a cache's report -> what the figure calls what did not run.
WORDS = {"forecast": "forecast", "left out": "left out", "skipped": "skipped", "reuse": "reused"}
HOLDERS = ("down", "mid", "up", "layer")

Report = Annotated[Path, typer.Argument(metavar="REPORT", help="What --report wrote in a run with --blocks.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="A figure, .svg, .png or .pdf; else text.")
]
Kinds = Annotated[
    str, typer.Option("--kind", metavar="KIND/...", help="Parts of these kinds.  [default: all but stages and layers]")
]
Pattern = Annotated[str, typer.Option("--part", metavar="PATTERN", help="Parts of these names, as `blocks.0.*`.")]


def show(report: Report, output: Output = None, kind: Kinds = "", part: Pattern = "*") -> None:
    """Show which blocks ran at which step: `#` all rows, `.` none; or draw it into a file."""
    reports = read(report)
    titles = [title(r) for r in reports]
    parts = [chosen(r["blocks"]["parts"], kind, part) for r in reports]
    if output is None:
        print(printable("\n\n".join(text(t, p) for t, p in zip(titles, parts, strict=True)), 10**6))
        return
    if output.suffix not in SUFFIXES or os.path.isdir(output):
        raise ConfigError(f"-o {output}: expected a file that ends in {', '.join(SUFFIXES)}")
    check_folder(output.parent)
    check_names([output])
    try:
        from suite.bench.blocks import draw
    except ImportError as error:
        raise ConfigError(
            "figures need matplotlib, which is not installed. Type: pip install 'efficient-diffusion-suite[bench]'"
        ) from error
    draw(output, titles[0], instead(reports[0]), reports[0]["blocks"]["asked"], parts[0])
    print(output)


def read(file: Path) -> list[Mapping[str, Any]]:
    """The reports in a file that `--report` wrote, each with its blocks.

    Raises:
        ConfigError: it is no such file, or was made without --blocks.
    """
    content = read_json(file, "report")
    reports = content.get("reports") if isinstance(content, Mapping) else None
    if not isinstance(reports, list) or not all(isinstance(r, Mapping) and "plugins" in r for r in reports):
        raise ConfigError(
            f"{file} is no report; make one with `suite image PROMPT --cache NAME --blocks --report {file}`"
        )
    with_blocks = [r for r in reports if r.get("blocks")]
    if not with_blocks:
        raise ConfigError(f"{file} does not say which blocks ran; make it again with --blocks --report {file}")
    return with_blocks


def title(report: Mapping[str, Any]) -> str:
    """The caches and what they ran in."""
    caches = ", ".join(p["name"] for p in report["plugins"] if p["hook"] == "cache") or "no cache"
    return f"{caches}: {report['model']}, {report['steps']} steps"


def instead(report: Mapping[str, Any]) -> str:
    """What happens where a part does not run, in the words of the cache's report."""
    what = " ".join(p["what"] for p in report["plugins"] if p["hook"] == "cache")
    return next((name for word, name in WORDS.items() if word in what), "not run")


def chosen(parts: Sequence[Mapping[str, Any]], kinds: str, pattern: str) -> list[Mapping[str, Any]]:
    """The parts of these kinds, or all that neither hold others nor are layers, whose names fit.

    Raises:
        ConfigError: there is none.
    """
    wanted = [k for k in kinds.split("/") if k]
    found = [p for p in parts if (p["kind"] in wanted if wanted else p["kind"] not in HOLDERS)]
    found = [p for p in found if fnmatch(p["name"], pattern)]
    if not found:
        known = ", ".join(dict.fromkeys(p["kind"] for p in parts)) or "nothing"
        raise ConfigError(f"--kind {kinds or 'any'} --part {pattern}: nothing fits; this network has {known}")
    return found


def text(heading: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """A line a part, a sign a step."""
    width = max(len(p["name"]) for p in parts)
    lines = [heading]
    for part in parts:
        signs = "".join(SIGNS[round(min(1.0, share) * (len(SIGNS) - 1))] for share in part["computed"])
        lines.append(f"  {part['name']:<{width}}  {signs}")
    return "\n".join(lines)
