"""The shipped video model through the engine and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `video` is not installed")

import suite
from suite import Engine, cli
from suite.errors import ConfigError
from suite.host.models import shipped
from suite.recipe import Recipe
from suite.request import Request

PACKAGE = Path(suite.__file__).parent
PROMPT = "a butterfly flapping its wings"


def make(**changes):
    content = {"steps": 3, "dtype": "fp32", "schedule": "log-snr", "solver": "ddim", "guidance": 3.0}
    return Recipe.from_dict(content | changes)


@pytest.fixture(scope="module")
def plain():
    with Engine.from_recipe(make(), modality="video") as engine:
        yield engine


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    return (code, *capsys.readouterr())


def test_same_seed_same_clip_and_other_seed_another(plain):
    first, again, other = (plain.generate(PROMPT, seed=s).artifacts[0].colour for s in (5, 5, 6))
    assert (first == again).all() and (first != other).any()
    assert first.shape == (24, 64, 64, 3)


def test_a_sample_does_not_depend_on_its_batch(plain):
    alone = plain.generate(PROMPT, seed=5).artifacts[0].colour.astype(int)
    together = plain.generate(["a rocket", PROMPT], seed=5, hold_seed=True).artifacts[1].colour.astype(int)
    assert np.abs(alone - together).max() <= 1


def test_prompts_matter(plain):
    a, b = (clip.colour.astype(int) for clip in plain.generate(["a red heart", "a rocket"], seed=1).artifacts)
    assert np.abs(a - b).mean() > 5


def test_frames_are_taken_evenly_from_the_loop_and_it_keeps_its_length(plain):
    whole = plain.generate(PROMPT, seed=5).artifacts[0]
    part = plain.generate(PROMPT, seed=5, options={"frames": 12}).artifacts[0]
    assert (part.colour == whole.colour[::2]).all() and part.seconds == pytest.approx(whole.seconds)
    fast = plain.generate(PROMPT, seed=5, options={"rate": 24.0, "loops": 2}).artifacts[0]
    assert (fast.rate, fast.loops) == (24.0, 2) and (fast.colour == whole.colour).all()


def test_more_frames_than_the_model_has_are_refused_before_it_is_loaded(plain):
    with pytest.raises(ConfigError, match="makes clips of 1 to 24 frames"):
        type(plain.modality).check(plain.plan.folder, Request((PROMPT,), options={"frames": 25}))


def test_report_records_the_options(plain):
    report = plain.generate(PROMPT, options={"frames": 6}).report
    assert report.options["frames"] == 6 and (report.nfe, report.depth) == (6, 3)


@pytest.mark.parametrize("model", sorted(shipped("video")))
def test_every_shipped_model_draws_and_moves(model: str):
    with Engine.from_recipe(make(steps=6), modality="video", model=model) as engine:
        clip = engine.generate("a butterfly", seed=1).artifacts[0]
    assert clip.colour.std() > 10
    from suite.modalities.video.metrics.motion import flicker, motion

    assert motion(clip.colour) > 0.3 and flicker(clip.colour) < 1.7  # neither a still nor noise


def test_diffusers_opens_the_shipped_network(plain):
    from diffusers import LatteTransformer3DModel

    network = LatteTransformer3DModel.from_pretrained(plain.plan.folder.path / "transformer")
    ours = plain.network.module.state_dict()
    assert all(torch.equal(v.float(), ours[k]) for k, v in network.state_dict().items())


def test_shipped_weights_fit_their_allowance():
    files = [f for e in shipped("video").values() for f in (PACKAGE / e["path"]).rglob("*.safetensors")]
    assert files and sum(f.stat().st_size for f in files) <= 24 * 2**20
    assert max(f.stat().st_size for f in files) <= 16 * 2**20


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", ".frames"])
def test_command_writes_and_replays(suffix: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (PROMPT, "-o", f"b{suffix}", "--steps", "2", "--frames", "4", "--json")
    code, out, _ = run(capsys, "video", *given)
    assert code == 0 and json.loads(out)["files"] == [f"b{suffix}"]
    code, out, _ = run(capsys, "replay", f"b{suffix}", "-o", f"again{suffix}", "--json")
    assert code == 0 and json.loads(out)["identical"]
    code, _, _ = run(capsys, "video", *given)  # the older result, even a folder, is replaced
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.avi"], "expected .mp4, .webp, .gif, .frames"),
        (["--frames", "25"], "1 to 24 frames"),
        (["--frames", "0"], "--frames 0"),
        (["--rate", "0"], "--rate 0"),
        (["--loops", "1000"], "--loops 1000"),
    ],
)
def test_bad_input_is_refused_with_code_2(arguments: list[str], message: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, "video", PROMPT, *arguments)
    assert code == 2 and message in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".webp", ".frames"])
def test_strength_0_is_the_clip_and_1_the_plain_run(plain, tmp_path, suffix):
    clip = plain.generate("a rocket", seed=9)
    file = tmp_path / f"clip{suffix}"
    clip.save(file)
    given = plain.modality.read(file).frames
    nothing = plain.generate(PROMPT, seed=5, init=plain.init(file, 0))
    got = nothing.artifacts[0]
    assert nothing.report.nfe == 0 and (got.opacity == clip.artifacts[0].opacity).all()
    assert (got.colour == given[..., :3]).all() and (got.opacity == given[..., 3]).all()
    everything, usual = (plain.generate(PROMPT, seed=5, init=i).artifacts[0] for i in (plain.init(file, 1), None))
    assert (everything.colour == usual.colour).all() and (everything.opacity == usual.opacity).all()


def test_clips_of_other_sizes_and_without_opacity_can_be_begun_with(plain, tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (100, 80), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    result = plain.generate(PROMPT, init=plain.init(tmp_path / "a.gif", 0.4))
    assert result.artifacts[0].colour.shape == (24, 64, 64, 3) and result.report.start["steps"] == 1
    got = plain.generate(PROMPT, init=plain.init(tmp_path / "a.gif", 0)).artifacts[0]
    assert (got.opacity == 255).all() and [int(got.colour[k, 30, 30, 0]) for k in (0, 8, 16)] == [0, 100, 200]
