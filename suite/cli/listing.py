"""`suite plugins`, `suite models`, `suite recipes`: what is there. Without torch."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from suite import recipe as recipe_files
from suite.errors import ConfigError, SuiteError
from suite.files.printable import printable
from suite.hookspecs import HOOKS, SINGLE
from suite.host import models as model_folders
from suite.host.discovery import Entry, find, installed
from suite.host.manager import implemented_hooks
from suite.host.suggest import nearest
from suite.plugin import EFFECT_WORDS, Plugin, options_of

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PluginName = Annotated[str, typer.Argument(metavar="NAME", help="A plugin of `suite plugins list`.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A model of `suite models list`.")]
RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A recipe of `suite recipes list`.")]
Hook = Annotated[
    Literal["schedule", "solver", "compress", "parallelize", "cache"] | None,
    typer.Option("--hook", help="Only plugins of this hook."),
]


def list_plugins(hook: Hook = None, as_json: Json = False) -> None:
    """List the installed plugins; one that cannot be loaded is listed with its error."""
    rows = [describe(entry) for entry in installed().values()]
    rows = [r for r in rows if hook is None or hook in r["hooks"]]
    rows.sort(key=lambda r: HOOKS.index(r["hooks"][0]) if r["hooks"] else len(HOOKS))
    if as_json:
        return _print_json({"plugins": rows})
    solvers = hook == "solver"
    table(
        (
            "name",
            "hook",
            *(("order", "noise") if solvers else ()),
            "modalities",
            "lossless",
            "from",
            "summary",
            "paper",
        ),
        [
            (
                r["name"],
                ", ".join(r["hooks"]),
                *((r["order"] or "-", "yes" if "stochastic-step" in r["effects"] else "no") if solvers else ()),
                ", ".join(r["modalities"] or ["all"]),
                _lossless(r),
                f"{r['distribution']} {r['version']}",
                r["summary"],
                r["paper"],
            )
            if "error" not in r
            else (
                r["name"],
                "broken",
                *(("", "") if solvers else ()),
                "",
                "",
                f"{r['distribution']} {r['version']}",
                r["error"],
                "",
            )
            for r in rows
        ],
    )


def show_plugin(name: PluginName, as_json: Json = False) -> None:
    """Show a plugin: its options, what it does to the run, and where it comes from."""
    entry = find(name, installed())
    row = describe(entry)
    if "error" in row:
        entry.load()
        raise ConfigError(row["error"])
    if as_json:
        return _print_json(row)
    print(f"{name}: {row['summary']}\n")
    facts = {
        "hook": ", ".join(row["hooks"]),
        "modalities": ", ".join(row["modalities"] or ["all"]),
        "lossless": _lossless(row),
        "paper": row["paper"],
        "order": row["order"],
        "from": f"{row['distribution']} {row['version']}, {entry.target}",
    }
    table((), [(k, v) for k, v in facts.items() if v])
    for title, lines in (
        ("options", [(o["name"], o["type"], f"default {o['default']}") for o in row["options"]]),
        ("effects", list(row["effects"].items())),
    ):
        print(f"\n{title}" if lines else f"\n{title}: none")
        if lines:
            table((), lines, indent=2)
    if row["doc"]:
        print(f"\n{row['doc']}")


def _lossless(row: dict[str, Any]) -> str:
    return {None: "-", True: "yes", False: "no"}[row["lossless"]]


def describe(entry: Entry) -> dict[str, Any]:
    """Everything about one plugin as plain data; with `error` if it cannot be loaded or is not a plugin."""
    row: dict[str, Any] = {
        "name": entry.name,
        "hooks": [],
        "distribution": entry.distribution,
        "version": entry.version,
        "target": entry.target,
    }
    try:
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Plugin)):
            return row | {"error": f"{entry.target} is not a subclass of suite.plugin.Plugin"}
        return row | _facts(cls)
    except SuiteError as error:
        return row | {"error": str(error)}
    except Exception as error:  # a third party's class may fail in any way; the listing goes on
        return row | {"error": f"plugin {entry.origin}: {type(error).__name__}: {error}"}


def _facts(cls: type[Plugin]) -> dict[str, Any]:
    options = options_of(cls)
    required = any(default is MISSING for _, default in options.values())
    # `effects` and `lossless` may depend on the options, so ask an instance where the defaults make one.
    example: Any = cls if required else cls()
    effects = () if isinstance(example.effects, property) else sorted(example.effects)
    return {
        "hooks": implemented_hooks(cls),
        "modalities": sorted(cls.modalities) if cls.modalities is not None else None,
        # Of a grid or a solver there is nothing to lose: it is another way, and no faster form of one.
        "lossless": None
        if SINGLE.issuperset(implemented_hooks(cls))
        else not isinstance(example.lossless, property) and bool(example.lossless),
        "summary": cls.summary,
        "paper": cls.paper,
        "order": cls.orders,
        "options": [
            {"name": name, "type": _type(kind), "default": "required" if default is MISSING else default}
            for name, (kind, default) in options.items()
        ],
        "effects": {word: EFFECT_WORDS.get(word, "a word of the plugin's own") for word in effects},
        "doc": inspect.getdoc(cls) or "",
    }


def _type(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def list_models(as_json: Json = False) -> None:
    """List the models that come with the suite."""
    found = {n: {**e, "path": str(_model_path(e))} for n, e in model_folders.shipped().items()}
    if as_json:
        return _print_json({"models": [{"name": n, **e} for n, e in found.items()]})
    table(
        ("name", "modality", "default", "summary"),
        [(n, e["modality"], "yes" if e.get("default") else "", e["summary"]) for n, e in found.items()],
    )


def show_model(name: ModelName, as_json: Json = False) -> None:
    """Show a model: where it lies, what its network is, and what it generates with by default."""
    known = model_folders.shipped()
    if name not in known:
        raise ConfigError(f"unknown model {name!r}{nearest(name, known) or f'; shipped: {_listed(known)}'}")
    folder = model_folders.open_folder(name, known[name]["modality"])
    size = sum(f.stat().st_size for f in folder.path.rglob("*.safetensors"))
    row = {
        **known[name],
        "name": name,
        "path": str(folder.path),
        "weight_bytes": size,
        "sha256": folder.hash,
        "facts": dict(folder.facts),
    }
    if as_json:
        return _print_json(row)
    print(f"{name}: {row.pop('summary')}\n")
    table((), [(k, v if isinstance(v, str | int) else json.dumps(v)) for k, v in row.items() if k != "facts"])
    print("\nfacts")
    table((), [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in row["facts"].items()], indent=2)


def _model_path(entry: Mapping[str, Any]) -> Path:
    return recipe_files.CONFIGS.parent / entry["path"]


def list_recipes(as_json: Json = False) -> None:
    """List the recipes that come with the suite."""
    found = {name: _recipe(path) for name, path in recipe_files.shipped().items()}
    if as_json:
        return _print_json({"recipes": [{"name": n, "summary": c.get("summary", "")} for n, c in found.items()]})
    table(("name", "summary"), [(n, c.get("summary", "")) for n, c in found.items()])


def show_recipe(name: RecipeName, as_json: Json = False) -> None:
    """Show a recipe as the YAML that `--recipe` reads."""
    known = recipe_files.shipped()
    if name not in known:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, known) or f'; shipped: {_listed(known)}'}")
    if as_json:
        return _print_json({"name": name, **_recipe(known[name])})
    print(known[name].read_text(encoding="utf-8").rstrip())


def _recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, indent=2, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], indent: int = 0) -> None:
    """Aligned columns; wrapped to the width of a terminal, one row a line into a pipe."""
    cells = [[printable(str(cell)) for cell in row] for row in ([header] if header else []) + list(rows)]
    lines = _wrapped(cells, bool(header)) if sys.stdout.isatty() else _padded(cells)
    for line in lines:
        print(" " * indent + line.rstrip())


def _padded(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Without rich: laying out a long list with it takes longer than reading all plugins."""
    columns = max(map(len, cells), default=0)
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(columns)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))


def _wrapped(cells: Sequence[Sequence[str]], header: bool) -> list[str]:
    from rich.console import Console
    from rich.table import Table

    names = cells[0] if header else ()
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header, header_style="bold")
    for i in range(max(map(len, cells), default=0)):
        grid.add_column(names[i] if i < len(names) else "", overflow="fold", no_wrap=i == 0)
    for row in cells[1:] if header else cells:
        grid.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as captured:
        console.print(grid)
    return captured.get().splitlines()


@dataclass(frozen=True)
class Commands:
    """The commands of one group."""

    summary: str
    functions: Mapping[str, Callable[..., None]]


GROUPS = {
    "plugins": Commands("What is installed.", {"list": list_plugins, "show": show_plugin}),
    "models": Commands("Models that come with the suite.", {"list": list_models, "show": show_model}),
    "recipes": Commands("Recipes that come with the suite.", {"list": list_recipes, "show": show_recipe}),
}
