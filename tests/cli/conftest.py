"""A model of the fake modality, and the command in this process or in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from suite.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fake_modality"
FACTS = {
    "name": "fake-4",
    "modality": "fake",
    "defaults": {"steps": 4, "guidance": 1.0, "schedule": "uniform", "solver": "ddim"},
}


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the fake distribution installed."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(FIXTURE))
    for variable in ("RANK", "WORLD_SIZE", "SUITE_DEBUG", "SUITE_NO_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model folder of the fake modality."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "suite.json").write_text(json.dumps(FACTS))
    numbers = np.random.default_rng(0)
    weight = numbers.normal(0, 0.1, (48, 48)).astype(np.float32)
    save_file({"weight": weight, "bias": np.zeros(48, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def suite(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(w) for w in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def launch(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python process in which the fake distribution is installed; it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, **variables: str) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(FIXTURE), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=here,
            env=os.environ | {"PYTHONPATH": path} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
