"""Imports point one way: plugins and modalities know the host; the host knows neither of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("plugins", "modalities", "kernels", "configs")
#: What a file of each part must not import.
FORBIDDEN = {
    "suite": ("suite.plugins", "suite.modalities"),
    "plugins": ("suite.modalities",),
    "modalities": ("suite.plugins",),
    "kernels": ("suite.plugins", "suite.modalities"),
}


def sources() -> list[tuple[str, str, Path]]:
    """(part, importable module name, file) of every Python file of the suite."""
    found = []
    for part in FORBIDDEN:
        for path in sorted((ROOT / part).rglob("*.py")):
            inside = path.relative_to(ROOT / part)
            if part == "suite" and inside.parts[0] in LINKED:
                continue  # the same file, seen through its link
            parts = ["suite"] if part == "suite" else ["suite", part]
            parts += inside.with_suffix("").parts
            found.append((part, ".".join(parts), path))
    return found


def imports(code: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import in `code`, those inside functions included."""
    package = module.removesuffix(".__init__").split(".")
    if not module.endswith(".__init__"):
        package = package[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(code: str, module: str, part: str) -> list[str]:
    bad = []
    for line, name in imports(code, module):
        if any(within(name, package) for package in FORBIDDEN[part]):
            bad.append(f"line {line}: {part} must not import {name}")
        # `kernels` alone is another project's name, and the other three would be second copies of ours.
        if any(within(name, folder) for folder in LINKED):
            bad.append(f"line {line}: import suite.{name}, not {name}")
    return bad


def test_every_part_has_files() -> None:
    assert {part for part, _, _ in sources()} >= {"suite", "plugins", "modalities"}


def test_imports_point_one_way() -> None:
    bad = [
        f"{path.relative_to(ROOT)}, {text}"
        for part, module, path in sources()
        for text in violations(path.read_text(encoding="utf-8"), module, part)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("part", "module", "code"),
    [
        ("suite", "suite.engine.engine", "import suite.plugins.cache.fora"),
        ("suite", "suite.engine.engine", "from suite import plugins"),
        ("suite", "suite.engine.engine", "from .. import modalities"),
        ("suite", "suite.__init__", "from .modalities.image import Image"),
        ("suite", "suite.testing.kit", "from ..plugins.solvers import ddim"),
        ("suite", "suite.cli", "def f():\n    from suite.modalities.image import Image"),
        ("suite", "suite.cli", "import importlib\nimportlib.import_module('suite.plugins.cache.fora')"),
        ("plugins", "suite.plugins.cache.fora", "from ...modalities.image import Image"),
        ("modalities", "suite.modalities.image.__init__", "from ...plugins.cache import fora"),
        ("plugins", "suite.plugins.cache.fora", "from plugins.cache import first_block"),
        ("plugins", "suite.plugins.cache.fora", "import kernels"),
        ("kernels", "suite.kernels.attention", "import suite.modalities"),
    ],
)
def test_a_planted_violation_is_found(part: str, module: str, code: str) -> None:
    assert len(violations(code, module, part)) == 1


@pytest.mark.parametrize(
    ("part", "module", "code"),
    [
        ("suite", "suite.engine.engine", "from .solver import Solver\nimport pluggy"),
        ("plugins", "suite.plugins.cache.fora", "from suite.kernels import attention"),
        ("plugins", "suite.plugins.cache.fora", "from . import first_block"),
        ("modalities", "suite.modalities.image.__init__", "from .decode import decode"),
        ("modalities", "suite.modalities.image.decode", "from suite.diffusion.noise import VP"),
    ],
)
def test_a_permitted_import_passes(part: str, module: str, code: str) -> None:
    assert not violations(code, module, part)
