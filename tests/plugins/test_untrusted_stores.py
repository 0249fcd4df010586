"""Stores into which somebody else has written: nothing outside is touched, and what is no entry is none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from suite.plugins.cache._store import Store, _marks, entries
from suite.plugins.cache.nirvana import Nirvana
from suite.plugins.cache.redi import ReDi
from tests.plugins.test_trajectory_stores import prompt, run

PLUGINS: dict[str, Callable[..., Any]] = {"nirvana": Nirvana, "redi": ReDi}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"vector": torch.randn(4, generator=rng), "state": torch.randn(2, 3, generator=rng)}


def row(**changes: Any) -> dict[str, Any]:
    return {"saves": 1, "uses": 1, "bytes": 10, "made": 1} | changes


KEYS = [
    "../victim/weights",
    "/etc/passwd",
    "a/../../victim/weights",
    "a/b/c",
    "a",
    ".a/b",
    "a/.b",
    "",
    "a\\b/c",
    "a/b\x00",
]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_an_index_names_nothing_outside(key: str, tmp_path: Path) -> None:
    """Formerly a key `../victim/weights` had `victim/weights.safetensors` deleted when the store was full."""
    victim = tmp_path / "victim" / "weights.safetensors"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    store = Store.open("nirvana", str(tmp_path / "store"), 1)
    store.put("s", "one", 1, tensors())
    index = tmp_path / "store" / "index.json"
    content = json.loads(index.read_text())
    content["entries"][key] = row(saves=0, bytes=2**40)
    index.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"index.json is damaged and was made anew"):
        assert store.put("s", "two", 1, tensors(1))
    assert victim.read_bytes() == b"precious"
    assert set(json.loads(index.read_text())["entries"]) == {"s/one", "s/two"}


@pytest.mark.parametrize("changes", [{"saves": "1"}, {"uses": -1}, {"bytes": 2**60}, {"made": 1.5}, {"bytes": True}])
def test_rows_of_an_index_are_whole_numbers(changes: dict[str, Any], tmp_path: Path) -> None:
    store = Store.open("nirvana", str(tmp_path / "store"), 1)
    store.put("s", "one", 1, tensors())
    index = tmp_path / "store" / "index.json"
    index.write_text(json.dumps({"format": "suite-store/1", "entries": {"s/one": row(**changes)}}))
    with pytest.warns(UserWarning, match=r"made anew; .*entries\.s/one"):
        assert store.held() == (tmp_path / "store" / "s" / "one.safetensors").stat().st_size


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither a linked entry nor one in a linked folder is read, replaced or deleted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file(tensors(), outside / "x.safetensors")
    before = (outside / "x.safetensors").read_bytes()
    store = Store.open("nirvana", str(tmp_path / "store"), 1)
    (tmp_path / "store" / "linked").symlink_to(outside)
    (tmp_path / "store" / "s").mkdir()
    (tmp_path / "store" / "s" / "x.safetensors").symlink_to(outside / "x.safetensors")
    assert store.vectors("linked")[0] == [] and store.vectors("s")[0] == []
    assert store.take("linked", "x") is None and store.take("s", "x") is None
    store.drop("linked", "x")
    with pytest.warns(UserWarning, match="is no folder, so nothing is stored there"):
        assert not store.put("linked", "y", 1, tensors())
    assert [p.name for p in outside.iterdir()] == ["x.safetensors"]
    assert (outside / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["nirvana", "redi"])
def test_temporary_files_are_no_entries(name: str, tmp_path: Path) -> None:
    """What a killed process left is neither read nor counted, and similar prompts go on."""
    plugin = PLUGINS[name](str(tmp_path / "store"))
    first, _, _ = run(plugin, (prompt(0),))
    for file in entries(tmp_path / "store"):
        file.with_name(f".{file.stem}.4711.safetensors").write_bytes(file.read_bytes()[:99])
        file.with_name("notes.safetensors").write_bytes(b"something else")
    (tmp_path / "store" / "index.json").unlink()
    (tmp_path / "store" / "index.json").write_text("{")
    with pytest.warns(UserWarning, match="made anew"):
        again, report, _ = run(plugin, (prompt(0),))
    assert torch.equal(first, again) and report and report.facts["skipped"] > 0
    assert not [k for k in json.loads((tmp_path / "store" / "index.json").read_text())["entries"] if "/." in k]


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "shape": lambda t: t | {"state": t["state"][:1]},
    "dtype": lambda t: t | {"state": t["state"].double()},
    "nan": lambda t: t | {"state": t["state"] * float("nan")},
    "missing": lambda t: {k: v for k, v in t.items() if k != "state"},
    "more": lambda t: t | {"further": torch.zeros(1)},
    "vector shape": lambda t: t | {"vector": t["vector"][:-1].contiguous()},
    "vector dtype": lambda t: t | {"vector": t["vector"].double()},
    "vector nan": lambda t: t | {"vector": t["vector"] * float("inf")},
    "integers": lambda t: t | {"vector": t["vector"].long()},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["nirvana", "redi"])
def test_entries_of_another_kind_are_dropped(name: str, change: str, tmp_path: Path) -> None:
    """With a right checksum and the wrong content: a warning each, and the run is the plain one."""
    plugin = PLUGINS[name](str(tmp_path / "store"))
    first, _, _ = run(plugin, (prompt(0),))
    files = entries(tmp_path / "store")
    for file in files:
        content = {k: v.contiguous() for k, v in CHANGES[change](load_file(file)).items()}
        save_file(content, file, _marks(file, content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again, report, _ = run(plugin, (prompt(0),))
    assert torch.equal(first, again) and report and report.facts["skipped"] == 0
    told = [str(w.message) for w in caught]
    assert told and len(told) <= len(files) and all("is damaged and was dropped" in text for text in told)


def test_a_stream_that_no_generator_takes(tmp_path: Path) -> None:
    plugin = Nirvana(str(tmp_path / "store"))
    first, _, _ = run(plugin, (prompt(0),))
    for file in entries(tmp_path / "store"):
        content = load_file(file) | {"stream": torch.full_like(load_file(file)["stream"], 255)}
        save_file(content, file, _marks(file, content))
    again, report, _ = run(plugin, (prompt(0),))
    assert torch.equal(first, again) and report and report.facts["skipped"] == 0
