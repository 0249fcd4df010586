"""No file of others is run: no pickle in our sources, and `torch.load` reads weights alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("suite", "plugins", "modalities", "kernels")
FORBIDDEN = ("pickle", "dill", "joblib", "shelve", "marshal")


def faults(source: str) -> list[str]:
    """What in a source could run what is in a file."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            out += [f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in FORBIDDEN]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("weights_only") != "True":
                out.append(f"line {node.lineno}: torch.load without weights_only=True")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
            out.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return out


def test_no_source_runs_what_a_file_holds() -> None:
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if f.is_file()]
    assert len(files) > 300
    found = {str(f.relative_to(ROOT)): why for f in files if (why := faults(f.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize("planted", [
    "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(text)",
    "yaml.load(text, Loader=L)",
])  # fmt: skip
def test_a_planted_fault_is_found(planted: str) -> None:
    assert len(faults(planted)) == 1
    assert not faults("torch.load(f, weights_only=True)") and not faults("yaml.safe_load(f)")
