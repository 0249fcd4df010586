"""What third parties build on changes on purpose only: the golden file says what it was, CHANGELOG that it changed.

    SUITE_UPDATE_API=1 python -m pytest tests/packaging/test_public_api.py

writes the golden file anew, once the version or the Unreleased section of CHANGELOG.md names the change.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("public_api.json")
UPDATE = "SUITE_UPDATE_API"

#: Names that docs/public-api.md promises, by the module from which they are imported. `*` is the module's `__all__`.
NAMES: dict[str, tuple[str, ...]] = {
    "suite": ("*",),
    "suite.call": ("Call", "activate", "active_call", "active_rows", "first_steps"),
    "suite.diffusion.denoiser": ("Cond", "Denoiser"),
    "suite.diffusion.guidance": ("Guidance",),
    "suite.diffusion.noise": ("NoiseSchedule", "from_config"),
    "suite.diffusion.prediction": ("Prediction",),
    "suite.diffusion.rng": ("SampleRng",),
    "suite.diffusion.sampler": ("Problem", "Sampler"),
    "suite.diffusion.schedule": ("Schedule", "check_timesteps", "with_exact_ends"),
    "suite.diffusion.solver": ("Denoise", "Solver", "SolverFacts", "transfer"),
    "suite.diffusion.start": ("Init", "Start", "truncated"),
    "suite.errors": (
        "ConfigError", "EmptyError", "NoOpError", "OutputError", "PluginError", "RuleError", "SuiteError",
    ),
    "suite.fitting.cache_fit": ("CacheMethod", "CacheProblem", "Measured"),
    "suite.fitting.calibration": ("Calibration", "Record"),
    "suite.fitting.grid_fit": ("Fitted", "GridMethod", "GridProblem"),
    "suite.hookspecs": ("HOOKS", "HOOKSPEC_VERSION", "SINGLE", "hookimpl", "hookspec"),
    "suite.host.models": ("ModelFolder",),
    "suite.mesh": ("Mesh",),
    "suite.modality": ("Modality",),
    "suite.network": ("BlockRef", "Layout", "Network"),
    "suite.network.experts": ("Companion", "Companions", "Expert"),
    "suite.network.patch": ("Patches",),
    "suite.network.weights": ("load_network",),
    "suite.plugin": ("EFFECT_WORDS", "Plugin"),
    "suite.recipe": ("Named", "Recipe"),
    "suite.request": ("Request", "RequestOption"),
    "suite.rules": ("Rule", "Verdict"),
    "suite.run": ("Run",),
    "suite.testing": ("*",),
    "suite.wrap": ("Wrap", "WrapReport", "reuse"),
}  # fmt: skip


# --- what the interface is ------------------------------------------------------------------------


def surface() -> dict[str, Any]:
    """Hooks, public names and entry-point groups, as plain data without anything that a Python version decides."""
    seen: dict[int, str] = {}
    names = {}
    for module, listed in NAMES.items():
        there = import_module(module)
        for name in there.__all__ if listed == ("*",) else listed:
            value, path = getattr(there, name), f"{module}.{name}"
            names[path] = f"is {seen[id(value)]}" if id(value) in seen else described(value)
            if callable(value):
                seen.setdefault(id(value), path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"hooks": hooks(), "names": names, "entry_point_groups": sorted(project["entry-points"])}


def hooks() -> dict[str, Any]:
    specs = import_module("suite.hookspecs")
    found = {}
    for name in specs.HOOKS:
        function = getattr(specs, name)
        single = ", first result" if function.suite_spec["firstresult"] else ""
        found[name] = signature(function) + single
    return found


def described(value: Any) -> Any:
    if inspect.isclass(value):
        return class_of(value)
    if inspect.isfunction(value):
        return signature(value)
    return text(value)


def class_of(cls: type) -> dict[str, Any]:
    """Fields, attributes, methods; inherited ones too, as far as the suite wrote them."""
    if issubclass(cls, Enum):
        return {"values": {member.name: text(member.value) for member in cls}}
    found: dict[str, Any] = {"bases": [base.__name__ for base in cls.__mro__[1:] if ours(base)]}
    if is_dataclass(cls):
        found["fields"] = [field_text(field) for field in fields(cls) if not field.name.startswith("_")]
    elif inspect.isfunction(cls.__init__) and ours(cls.__init__):
        found["__init__"] = signature(cls.__init__)
    known = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    for owner in reversed([base for base in cls.__mro__ if ours(base)]):
        for name, kind in inspect.get_annotations(owner).items():
            if not name.startswith("_") and name not in known:
                found[name] = f"{kind} = {text(vars(owner)[name])}" if name in vars(owner) else f"{kind}"
        for name, member in vars(owner).items():
            if (name == "__call__" or not name.startswith("_")) and name not in known:
                found[name] = member_text(owner, name, member)
    return found


def member_text(owner: type, name: str, member: Any) -> str:
    kind = inspect.get_annotations(owner).get(name)
    if isinstance(member, property):
        assert member.fget is not None
        return f"property {signature(member.fget)}"
    if isinstance(member, classmethod | staticmethod):
        return f"{type(member).__name__} {signature(member.__func__)}"
    if inspect.isfunction(member):
        abstract = "abstract " if getattr(member, "__isabstractmethod__", False) else ""
        return abstract + signature(member)
    return f"{kind} = {text(member)}" if kind else f"= {text(member)}"


def field_text(field: Any) -> str:
    default = "" if field.default is MISSING else f" = {text(field.default)}"
    return f"{field.name}: {field.type}{default or ('' if field.default_factory is MISSING else ' = ...')}"


def signature(function: Any) -> str:
    """As written: annotations are the text that `from __future__ import annotations` keeps, never evaluated."""
    given, marks, parts = inspect.signature(function), {"star": False}, []
    positional = [p for p in given.parameters.values() if p.kind is p.POSITIONAL_ONLY]
    for parameter in given.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not marks["star"]:
            parts.append("*")
        marks["star"] |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {text(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{kind}{default}")
        if positional and parameter is positional[-1]:
            parts.append("/")
    back = "" if given.return_annotation is given.empty else f" -> {annotation(given.return_annotation)}"
    return f"({', '.join(parts)}){back}"


def annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def text(value: Any) -> str:
    """A value without addresses, set order, or a `repr` that may differ between versions of Python or torch."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, frozenset | set):
        return "{" + ", ".join(sorted(map(text, value))) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(text, value)) + ")"
    if isinstance(value, Mapping):  # words, whose explanations may be put better at any time
        return "{" + ", ".join(sorted(map(text, value))) + "}"
    return f"<{value.__name__}>" if inspect.isclass(value) else "<value>"


def ours(thing: Any) -> bool:
    return thing.__module__ == __name__ or (thing.__module__ or "").split(".")[0] == "suite"


# --- what changed, and whether it was announced ----------------------------------------------------


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}: {key}" if path else key)
    return found


def changes(old: Any, new: Any) -> list[str]:
    """One line a difference, the smallest that can be named."""
    before, now = flat(old), flat(new)
    lines = []
    for path in sorted(before.keys() | now.keys()):
        was, is_ = before.get(path), now.get(path)
        if was == is_:
            continue
        if isinstance(was, list) and isinstance(is_, list):
            lines += [f"- {path}: {entry}" for entry in was if entry not in is_]
            lines += [f"+ {path}: {entry}" for entry in is_ if entry not in was]
            if sorted(was) == sorted(is_):
                lines.append(f"~ {path}: another order: {', '.join(is_)}")
            continue
        lines += [f"- {path}: {was}"] if path in before else []
        lines += [f"+ {path}: {is_}"] if path in now else []
    return lines


@dataclass(frozen=True)
class Announced:
    """Where a change can be named: the version, and the digest of CHANGELOG's Unreleased section."""

    version: str
    unreleased: str

    @staticmethod
    def now() -> Announced:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return Announced.of(project["version"], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))

    @staticmethod
    def of(version: str, changelog: str) -> Announced:
        section = re.search(r"^## \[Unreleased\]$(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
        words = " ".join(section[1].split()) if section else ""  # a line broken elsewhere announces nothing
        return Announced(version, hashlib.sha256(words.encode()).hexdigest())


def write(golden: Path, api: Any, announced: Announced) -> None:
    """Write the golden file anew, if the change was announced since it was written last."""
    if golden.exists():
        old = json.loads(golden.read_text(encoding="utf-8"))
        different = changes(old["api"], api)
        if not different:
            return  # its version and digest stay those of the last change
        if Announced(old["version"], old["unreleased"]) == announced:
            pytest.fail(
                message(different) + f"\nNot written: neither the version ({announced.version}) nor the Unreleased "
                "section of CHANGELOG.md has changed since the golden file was written. Name the change there first."
            )
    content = {"version": announced.version, "unreleased": announced.unreleased, "api": api}
    golden.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def message(different: list[str], most: int = 60) -> str:
    more = [f"... and {len(different) - most} more"] if len(different) > most else []
    lines = [
        "the interface of third parties is not what tests/packaging/public_api.json says:",
        *different[:most],
        *more,
        "If this is not meant, undo it. If it is meant (docs/public-api.md):",
        "1. name it in the Unreleased section of CHANGELOG.md (`Changed` or `Removed` if it can break a plugin);",
        f"2. {UPDATE}=1 python -m pytest tests/packaging/test_public_api.py",
    ]
    return "\n".join(lines)


def compare(golden: Path, api: Any) -> None:
    different = changes(json.loads(golden.read_text(encoding="utf-8"))["api"], api)
    if different:
        pytest.fail(message(different))


# --- tests ------------------------------------------------------------------------------------------


def test_the_interface_is_as_written() -> None:
    api = surface()
    if os.environ.get(UPDATE):
        write(GOLDEN, api, Announced.now())
    compare(GOLDEN, api)


def imported(page: str) -> Iterator[tuple[str, str]]:
    """(module, name) of all that the Python blocks of a page import from the suite."""
    for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "suite":
                for alias in node.names:
                    yield node.module or "", alias.name


def promised() -> dict[str, set[str]]:
    """The names of each module, `*` written out."""
    return {m: set(import_module(m).__all__ if names == ("*",) else names) for m, names in NAMES.items()}


@pytest.mark.parametrize("page", ["authoring.md", "modality.md"])
def test_what_authors_are_told_to_import_is_promised(page: str) -> None:
    found = {f"{m}.{name}" for m, name in imported((ROOT / "docs" / "plugins" / page).read_text(encoding="utf-8"))}
    assert found, "the pages show complete files"
    known = {f"{module}.{name}" for module, names in promised().items() for name in names} | NAMES.keys()
    unknown = sorted(found - known)
    assert not unknown, f"docs/plugins/{page} imports what NAMES in {Path(__file__).name} does not promise: {unknown}"


def test_the_page_lists_what_is_promised() -> None:
    page = (ROOT / "docs" / "public-api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(suite[\w.]*)` \| (`.*`) \|$", page, re.MULTILINE)
    assert {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows} == promised()


@dataclass(frozen=True)
class Sample:
    """What the tests below change."""

    a: int
    b: float = 1.0

    def do(self, x: int, *, y: str = "z") -> bool:
        return bool(x) and bool(y)

    @property
    def size(self) -> int:
        return 1


def test_signatures_are_the_text_of_the_source() -> None:
    assert class_of(Sample) == {
        "bases": [],
        "fields": ["a: int", "b: float = 1.0"],
        "do": "(self, x: int, *, y: str = 'z') -> bool",
        "size": "property (self) -> int",
    }
    assert text(frozenset({"b", "a"})) == "{'a', 'b'}"
    assert hooks()["schedule"] == "(noise: NoiseSchedule, run: Run) -> Schedule | None, first result"


def planted() -> dict[str, Any]:
    """The interface with one field more, one option gone, and one hook that gets something else."""
    api = json.loads(json.dumps(surface()))
    api["names"]["suite.Call"]["fields"].append("colour: str = ''")
    del api["names"]["suite.network.weights.load_network"]
    api["hooks"]["cache"] = "(network: Network) -> Wrap | None"
    return api


def test_a_planted_change_is_found_and_named() -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        compare(GOLDEN, planted())
    said = str(failure.value)
    assert "+ names: suite.Call: fields: colour: str = ''" in said
    assert "- names: suite.network.weights.load_network: (" in said
    assert "+ hooks: cache: (network: Network) -> Wrap | None" in said
    assert "CHANGELOG.md" in said
    assert f"{UPDATE}=1" in said


def test_a_change_of_order_is_a_change() -> None:
    assert changes({"fields": ["a: int", "b: int"]}, {"fields": ["b: int", "a: int"]})


def test_a_change_that_nobody_announced_is_not_written(tmp_path: Path) -> None:
    golden, before = tmp_path / "api.json", Announced.of("0.1.0", "## [Unreleased]\n\n## [0.0.1]\n- old\n")
    write(golden, surface(), before)
    untouched = golden.read_text()
    with pytest.raises(pytest.fail.Exception, match="Not written"):
        write(golden, planted(), before)
    older = Announced.of("0.1.0", "## [Unreleased]\n\n## [0.0.1]\n- older\n")
    assert older == before, "other sections announce nothing"
    assert golden.read_text() == untouched
    write(golden, planted(), Announced.of("0.1.0", "## [Unreleased]\n### Changed\n- `Call.colour`\n"))
    compare(golden, planted())
    write(golden, surface(), Announced.of("0.2.0", "## [Unreleased]\n### Changed\n- `Call.colour`\n"))
    compare(golden, surface())
