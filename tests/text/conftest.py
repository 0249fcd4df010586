"""A training set of real texts and a model of each family, trained for two steps: mechanics, not quality."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="the extra `text` is not installed")

from suite.modalities.text.data import write
from suite.modalities.text.metrics.reference import load_real
from suite.modalities.text.sources import KINDS, Record
from suite.modalities.text.training import train

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = {"steps": 2, "compile": False, "precision": "fp32", "warmup": 1, "log_every": 1, "save_every": 100}


def vectors(words):
    """In place of sentence vectors: the suite's encoder is tested elsewhere."""
    return torch.randn(len(words), 48, generator=torch.Generator().manual_seed(len(words)))


@pytest.fixture(scope="session")
def records() -> list[Record]:
    real = load_real()
    columns = zip(real.texts, real.prompts, real.kinds, strict=True)
    return [Record(KINDS.index(kind), (prompt, "other"), text) for text, prompt, kind in columns]


@pytest.fixture(scope="session")
def data(records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return write(folder / "text-600.safetensors", records, 600, [], vectors)


@pytest.fixture(scope="session")
def pieces(records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in MiniLM's word pieces."""
    return write(tmp_path_factory.mktemp("text") / "text-pieces.safetensors", records, None, [], vectors)


@pytest.fixture(scope="session")
def written_again(records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    return write(folder / "again.safetensors", records, 600, [], vectors)


@pytest.fixture(scope="session")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, out = tmp_path_factory.mktemp("configurations"), {}
    encoder = {"start": "minilm", "num_hidden_layers": 2, "max_position_embeddings": 40}
    families = {
        "masked": {"family": "masked", "noise": {"family": "masked"}},
        "continuous": {"family": "continuous", "noise": {"family": "sqrt"}, "width": 8},
        "encoder": {"family": "masked", "noise": {"family": "masked"}, "model": encoder, "weighting": "mean",
                    "shares_at": {16: {"definition": 1.0}}},
    }  # fmt: skip
    solvers = {"masked": "mdlm", "continuous": "ddim", "encoder": "mdlm"}
    for family, more in families.items():
        defaults = {"steps": 4, "guidance": 1.0, "schedule": "uniform", "solver": solvers[family]}
        tree = {"name": f"tiny-{family}", "model": TINY, "canvases": {16: 4, 24: 2},
                "canvas_shares": {16: 0.5, 24: 0.5}, "defaults": defaults, "train": OPTIONS, **more}  # fmt: skip
        out[family] = folder / f"{family}.yaml"
        out[family].write_text(yaml.safe_dump(tree))
    return out


@pytest.fixture(scope="session")
def models(data: Path, pieces: Path, configurations, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out, files = tmp_path_factory.mktemp("runs"), {"encoder": pieces}
    return {family: train(path, files.get(family, data), out / family) for family, path in configurations.items()}
