"""Finite or refused: weights, files, calibrations, checkpoints, and what a run makes, in every modality."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import suite
from suite import Engine
from suite.diffusion.start import Init
from suite.errors import ConfigError, NumericsError
from suite.files.inputs import read_json
from suite.host.discovery import MODALITIES, installed
from suite.host.models import open_folder, shipped
from suite.host.plan import make_plan
from suite.observe.finite import check_tensors, is_finite
from suite.recipe import Recipe
from suite.testing.engine import tiny_engine

NAN, INF = math.nan, math.inf
ROOT = Path(suite.__file__).resolve().parent


def copied(folder: Path, to: Path) -> Path:
    """A copy of a model whose files are links: those that are written are replaced."""
    shutil.copytree(folder, to, copy_function=os.symlink)
    return to


def spoil(file: Path, value: float) -> str:
    """Put one such number into the last tensor of real numbers; its name."""
    tensors = load_file(file)
    name = [n for n, t in sorted(tensors.items()) if t.is_floating_point()][-1]
    tensors[name].view(-1)[-1] = value
    file.unlink()
    save_file(tensors, file)
    return name


def files() -> list[Any]:
    """(modality, model, file) of all weights that are in the folder of a modality's default model."""
    out = []
    for modality in ("image", "video", "text", "audio"):
        entry = next(e for e in shipped(modality).values() if e.get("default"))
        folder = ROOT / entry["path"]
        out += [(modality, folder, f.relative_to(folder)) for f in sorted(folder.rglob("*.safetensors"))]
    folder = ROOT / shipped("text")["gloss-continuous"]["path"]  # which has a table of embeddings beside
    out += [("text", folder, f.relative_to(folder)) for f in sorted(folder.rglob("*.safetensors"))]
    return [pytest.param(*row, id=f"{row[0]}-{row[1].name}-{row[2]}") for row in dict.fromkeys(out)]


@pytest.mark.parametrize(("modality", "folder", "file"), files())
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, modality: str, folder: Path, file: Path) -> None:
    model = copied(folder, tmp_path / "model")
    name = spoil(model / file, NAN)
    with pytest.raises(ConfigError) as raised:
        Engine(make_plan(modality, model=str(model), overrides=Recipe(dtype="bf16")), "cpu")
    assert str(model / file) in str(raised.value) and f"tensor {name} has 1 of" in str(raised.value)


def test_the_command_says_it_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from suite.cli import main

    model = copied(ROOT / shipped("image")["emoji-unet-32"]["path"], tmp_path / "model")
    spoil(next(model.rglob("*.safetensors")), INF)
    assert main(["image", "a red apple", "--model", str(model), "-o", str(tmp_path / "x.png")]) == 2
    assert "NaN or infinite" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_counts_as_finite(dtype: torch.dtype) -> None:
    largest = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not
    assert is_finite(largest) and is_finite(torch.tensor([3])) and is_finite(torch.zeros(0, dtype=dtype))
    for values in ([NAN], [INF], [-INF], [INF, -INF]):
        assert not is_finite(torch.tensor([1.0, *values], dtype=dtype))
    with pytest.raises(ConfigError, match=r"here: tensor b has 1 of 2 numbers"):
        check_tensors({"a": torch.ones(2), "b": torch.tensor([1, NAN]).to(dtype)}, "here")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("network", ["transformer", "tokens"])
def test_a_run_that_breaks_says_at_which_step(network: str, dtype: str) -> None:
    with tiny_engine(network, dtype=dtype) as engine:
        part: Any = engine.network.module
        calls = 0

        def late(module: Any, arguments: Any, out: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < 5:
                return out
            return out * NAN if isinstance(out, torch.Tensor) else (out[0] * NAN,)

        (part.decoder if network == "tokens" else part).register_forward_hook(late)
        with pytest.raises(NumericsError, match=r"NaN or infinity at step 5 of 11 \(t = 0.6364\)") as raised:
            engine.generate("a red apple")
    assert NumericsError.exit_code == 2 and ("--dtype fp32" in str(raised.value)) == (dtype == "bf16")


def test_what_a_file_begins_with_is_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine() as engine:
        x0 = torch.zeros(1, 4, 8, 8)
        x0[0, 1, 2, 3] = INF
        monkeypatch.setattr(type(engine.modality), "to_x0", lambda self, content, request: content)
        with pytest.raises(ConfigError, match=r"--init x\.bin holds numbers that are NaN or infinite"):
            engine.generate("a", init=Init(x0, "x.bin", "", modality="tiny"))
        assert engine.generate("a", init=Init(torch.zeros_like(x0), "x.bin", "", modality="tiny")).artifacts


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_sound_to_begin_with_is_finite(tmp_path: Path, value: float) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = torch.zeros(1600)
    samples[100] = value
    soundfile.write(tmp_path / "x.wav", samples.numpy(), 16000, subtype="FLOAT")
    with pytest.raises(ConfigError, match=r"x\.wav has 1 samples that are no numbers"):
        Init.of(installed(MODALITIES)["audio"].load(), tmp_path / "x.wav")


def test_distillation_stops_at_the_first_iteration_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"iterations": 3, "views": 1, "resolution": 24, "refine": 0}
    with Engine.from_recipe(modality="3d", model="emoji-unet-32") as engine:

        def broken(module: Any, arguments: Any, out: Any) -> Any:
            return tuple(o * NAN for o in out)

        hook: Any = engine.network.module.register_forward_hook(broken)
        with pytest.raises(NumericsError, match="in the views' gradient after iteration 1"):
            engine.generate("a red apple", options=quick)
        hook.remove()
        from suite.modalities.three_d.scene import FieldScene

        whole = FieldScene.updated

        def spoiled(self: FieldScene, progress: float) -> None:
            whole(self, progress)
            if progress == 1:
                self.field.grids[0].data[0, 0, 0, 0, 0] = NAN

        monkeypatch.setattr(FieldScene, "updated", spoiled)
        with pytest.raises(NumericsError, match=r"in grids.0 after iteration 3"):
            engine.generate("a red apple", options=quick)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}'])
def test_json_that_holds_no_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"calibration .*x.json is not JSON"):
        read_json(tmp_path / "x.json", "calibration")
    (tmp_path / "x.json").write_text(json.dumps({"a": [1.5e300, -2, 0.1]}))
    assert read_json(tmp_path / "x.json", "calibration") == {"a": [1.5e300, -2, 0.1]}


def test_the_hash_is_of_all_bytes_in_order(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "suite.json").write_text('{"modality": "image"}')
    parts = [os.urandom(2**20 + 7), b"", os.urandom(5)]
    for index, part in enumerate(parts):
        (tmp_path / f"{index}.safetensors").write_bytes(part)
    assert open_folder(str(tmp_path), "image").hash == hashlib.sha256(b"".join(parts)).hexdigest()


def test_tokens_of_a_run_are_those_of_its_length() -> None:
    with Engine.from_recipe({"steps": 2}, modality="text") as engine:
        usual = engine._run(engine.request(("a",)), (0,)).tokens
        asked = engine._run(engine.request(("a",), options={"length": 17}), (0,)).tokens
    assert asked == 17 != usual == engine.network.layout.tokens  # pyright: ignore[reportOptionalMemberAccess]
