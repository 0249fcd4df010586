"""kill -9 at random moments: nothing that is half written is ever taken for whole, and what is begun can be ended."""

import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from suite.bench.record import Record
from suite.files.output import write_text
from suite.plugins.cache._store import Store
from suite.training.checkpoint import latest, restore, step_of
from suite.training.loop import TrainOptions, begin, train

pytestmark = pytest.mark.slow
KILLS = 4
ROOT = Path(__file__).parents[2]
STORE = """
import torch
from suite.plugins.cache._store import Store
store = Store.open("it", sys.argv[1], 4)
for k in itertools.count():
    store.put("stamp", f"{os.getpid()}.{k}.1", 1, {"vector": torch.ones(8), "state": torch.full((40_000,), float(k))})
    store.take("stamp", f"{os.getpid()}.{k}.1")
    ready()
"""
RECORD = """
from pathlib import Path
from suite.bench.record import Record
record = Record.open(Path(sys.argv[1]), "caches", {"steps": 3}, resume=True)
for k in itertools.count(len(record.rows)):
    record.rows.append({"cell": k, "text": "x" * 5000})
    record.save()
    ready()
"""
TRAIN = """
from pathlib import Path
sys.path.insert(0, "tests/core")
from test_kill import OPTIONS, loss, network
from suite.training.checkpoint import latest
from suite.training.loop import train
out = Path(sys.argv[1])
train(network(), lambda *given: (ready(), loss(*given))[1], OPTIONS, out, resume=latest(out) is not None, device="cpu")
"""
OPTIONS = TrainOptions(steps=5000, precision="fp32", compile=False, warmup=2, save_every=2, log_every=1, lr=1e-2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def loss(module: nn.Module, rng: torch.Generator) -> torch.Tensor:
    return module(torch.randn(4, 64, generator=rng)).square().mean()


def killed(code: str, folder: Path, moment: float) -> None:
    """Run the code, and kill it `moment` seconds after it was first ready."""
    begin = "import itertools, os, sys\ndef ready(): os.write(1, b'.')\n"
    words = [sys.executable, "-c", begin + code, str(folder)]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b".", process.stderr.read().decode()
        time.sleep(moment)
        process.kill()


def moments() -> list[float]:
    return [random.Random(k).uniform(0, 0.3) for k in range(KILLS)]


def test_a_store_holds_whole_entries_only(tmp_path: Path):
    for moment in moments():
        killed(STORE, tmp_path, moment)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged entry or index would be one
            store = Store.open("it", str(tmp_path), 4)
            names, _ = store.vectors("stamp")
            assert names and all(store.take("stamp", name) is not None for name in names)
        write_text(tmp_path / "stamp" / "next", "")
        assert not list(tmp_path.rglob(".suite-*"))


def test_a_record_goes_on_where_it_was(tmp_path: Path):
    rows = 0
    for moment in moments():
        killed(RECORD, tmp_path, moment)
        record = Record.open(tmp_path, "caches", {"steps": 3}, resume=True)
        assert [row["cell"] for row in record.rows] == list(range(len(record.rows))) and len(record.rows) > rows
        rows = len(record.rows)
        record.save()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["caches.csv", "caches.json"]


def test_a_training_goes_on_from_a_whole_checkpoint(tmp_path: Path):
    out = tmp_path / "run"
    for moment in moments():
        killed(TRAIN, out, 0.2 + moment)
        if (found := latest(out)) is not None:
            restore(found, begin(network(), OPTIONS), {"optimizer": OPTIONS.optimizer, "seed": OPTIONS.seed})
    found = latest(out)
    assert found is not None
    state = train(network(), loss, OPTIONS, out, resume=True, device="cpu", minutes=0.02)
    assert state.step > step_of(found)
    steps = [int(line.split(",")[0]) for line in (out / "loss.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, state.step + 1))
    assert sorted(p.name for p in out.iterdir()) == [f"checkpoint-{state.step:08d}", "loss.csv"]
