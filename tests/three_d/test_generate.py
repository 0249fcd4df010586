"""`suite 3d` with an image model as prior: real runs of very few iterations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from suite import Engine
from suite.cli import main
from suite.engine.score_distillation import Distilled
from suite.errors import ConfigError, EmptyError, RuleError
from suite.host.plan import make_plan
from suite.modalities.three_d import ThreeD
from suite.modalities.three_d.colours import linear
from suite.modalities.three_d.field import Field
from suite.modalities.three_d.scene import FieldScene
from suite.recipe import shipped

PRIOR = "emoji-unet-32"
"""Of the image models: the quick one."""
QUICK = {"iterations": 2, "views": 1, "resolution": 32}


@pytest.fixture(scope="module")
def engine():
    with Engine.from_recipe(modality="3d", model=PRIOR) as opened:
        yield opened


@pytest.fixture(scope="module")
def result(engine):
    return engine.generate("a red apple", options=QUICK)


def test_a_closed_coloured_mesh_and_the_same_report_as_ever(result):
    solid = result.artifacts[0]
    assert solid.mesh.is_watertight and solid.mesh.volume > 0
    assert len(solid.frames) > 8 and solid.preview.size[0] > solid.preview.size[1] > 0
    report = result.report
    assert (report.modality, report.model, report.options["distill"]) == ("3d", PRIOR, "sds")
    # Two iterations of one view with both guidance branches, each iteration one call.
    assert (report.nfe, report.depth) == (4, 2)
    assert [record["iteration"] for record in solid.log] == [0, 1] and not result.stopped


def test_evaluations_are_counted_for_each_view(engine):
    report = engine.generate("a red apple", options=QUICK | {"views": 3}).report
    assert (report.nfe, report.depth) == (12, 2)


def test_same_seed_same_mesh_alone_or_in_a_batch(engine, result):
    both = engine.generate(["a blue heart", "a red apple"], options=QUICK, hold_seed=True)
    assert np.array_equal(both.artifacts[1].mesh.vertices, result.artifacts[0].mesh.vertices)
    other = engine.generate("a red apple", seed=1, options=QUICK)
    assert not np.array_equal(other.artifacts[0].mesh.vertices, result.artifacts[0].mesh.vertices)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_files_carry_mesh_colours_and_metadata(result, tmp_path, suffix):
    written = result.save_one(0, tmp_path / f"apple{suffix}")
    names = {path.name for path in written}
    assert {f"apple{suffix}", f"apple{suffix}.preview.png", f"apple{suffix}.log.csv"} < names
    assert names & {f"apple{suffix}.turntable.mp4", f"apple{suffix}.turntable.gif"}
    loaded = trimesh.load(written[0], force="mesh")
    own = result.artifacts[0].mesh
    assert loaded.is_watertight and len(loaded.faces) == len(own.faces)
    np.testing.assert_allclose(loaded.bounds, own.bounds, atol=1e-5)
    wanted = np.asarray(own.visual.vertex_colors)[:, :3]
    if suffix != ".glb":
        colours = np.asarray(loaded.visual.vertex_colors)[:, :3].astype(int)
    else:  # linear, and beside a material; see test_files
        (part,) = trimesh.load(written[0]).geometry.values()
        colours, wanted = np.asarray(part.visual.vertex_attributes["color"])[:, :3] * 255, linear(wanted / 255) * 255
    assert np.abs(colours.mean(0) - wanted.mean(0)).max() < 2
    assert ThreeD.read_metadata(written[0]) == json.loads(json.dumps(result.metadata(0)))
    again = tmp_path / f"again{suffix}"
    result.save_one(0, again)
    assert ThreeD.same(written[0], again)


def test_the_preview_shows_the_object_and_the_clip_turns(result, tmp_path):
    av = pytest.importorskip("av")
    result.save_one(0, tmp_path / "apple.glb")
    with Image.open(tmp_path / "apple.glb.preview.png") as picture:
        assert np.asarray(picture).std() > 5
    with av.open(str(tmp_path / "apple.glb.turntable.mp4")) as box:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in box.decode(video=0)]
    assert len(frames) == len(result.artifacts[0].frames)


def test_without_pyav_the_clip_is_a_gif(result, tmp_path, monkeypatch):
    from suite.modalities.three_d import pictures

    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    result.save_one(0, tmp_path / "apple.glb")
    with Image.open(tmp_path / "apple.glb.turntable.gif") as clip:
        assert clip.n_frames == len(result.artifacts[0].frames)


@pytest.mark.parametrize("name, content", [("a.glb", b"glTFnot"), ("b.obj", b"v 0 0 0\n"), ("c.ply", b"ply\n")])
def test_a_file_of_others_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        ThreeD.read_metadata(path)


def test_an_empty_field_says_so_and_keeps_preview_and_log(engine, result, tmp_path):
    field = Field((8, 16))
    with torch.no_grad():
        field.grids[1][:, 0] -= 20
    scene = FieldScene(field, {}, 32, 1, False)
    request = engine.request(["nothing"], options=QUICK)
    solids = engine.modality.decode([Distilled(scene, [{"iteration": 0.0, "t": 0.5}])], request)
    empty = type(result)(solids, result.report, engine.modality)
    with pytest.raises(EmptyError, match=r"stayed empty.*kept: .*none\.glb\.preview\.png.*glb\.log\.csv") as caught:
        empty.save_one(0, tmp_path / "none.glb")
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none.glb.log.csv", "none.glb.preview.png"]


def test_vsd_learns_the_views_and_leaves_the_teacher_alone(engine):
    before = {name: value.clone() for name, value in engine.network.module.state_dict().items()}
    result = engine.generate("a red apple", options=QUICK | {"distill": "vsd"})
    # Each iteration: the teacher's two branches, and the adapters' network once to ask and once to learn.
    assert (result.report.nfe, result.report.depth) == (8, 6)
    assert all(record["score_loss"] > 0 for record in result.artifacts[0].log)
    after = engine.network.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_ism_inverts_with_the_solver():
    with Engine.from_recipe({"solver": "ddim"}, modality="3d", model=PRIOR) as opened:
        result = opened.generate("a red apple", options=QUICK | {"distill": "ism", "target-steps": 2})
        # Two inversion steps, and one evaluation at the end.
        assert result.report.depth == 2 * 3
    with Engine.from_recipe({"solver": "dpmpp-2m"}, modality="3d", model=PRIOR) as opened:
        with pytest.raises(ConfigError, match="--solver ddim"):
            opened.generate("a red apple", options=QUICK | {"distill": "ism"})


def test_a_compressed_teacher_teaches():
    with Engine.from_recipe({"compress": ["int8"]}, modality="3d", model="emoji-64") as opened:
        report = opened.generate("a red apple", options=QUICK).report
    assert next(p.did for p in report.plugins if p.hook == "compress") > 0


def test_a_step_cache_is_refused_with_the_reason():
    with pytest.raises(RuleError, match="C33"):
        Engine.from_recipe({"cache": ["fora"]}, modality="3d", model=PRIOR)


def test_a_checkpoint_is_taken_up_and_guarded(engine, tmp_path):
    place = str(tmp_path / "apple.safetensors")
    first = engine.generate("a red apple", options=QUICK | {"checkpoint": place})
    assert Path(place).is_file()
    more = engine.generate("a red apple", options=QUICK | {"checkpoint": place, "iterations": 3})
    assert [record["iteration"] for record in more.artifacts[0].log] == [2]
    assert first.report.depth == 2 and more.report.depth == 1
    with pytest.raises(ConfigError, match="is of prompt 'a red apple', this run has 'a cat'"):
        engine.generate("a cat", options=QUICK | {"checkpoint": place})
    with pytest.raises(ConfigError, match="one sample"):
        engine.generate(["a", "b"], options=QUICK | {"checkpoint": place})
    Path(place).write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="damaged"):
        engine.generate("a red apple", options=QUICK | {"checkpoint": place})


def test_a_stop_keeps_what_exists(engine):
    def stop(step):
        if step == 3:  # in the second sample
            raise KeyboardInterrupt

    result = engine.generate(["a", "b", "c"], options=QUICK | {"iterations": 3}, on_step=stop)
    assert result.stopped and len(result.artifacts) == 2
    assert [len(solid.log) for solid in result.artifacts] == [3, 1]


def test_the_command_line_end_to_end_and_replay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["3d", "a red apple", "-o", "apple.glb", "--model", PRIOR, "--iterations", "2", "--views", "1"]
    assert main([*words, "--resolution", "32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"][0] == "apple.glb" and all(Path(file).stat().st_size for file in told["files"])
    assert told["reports"][0]["options"]["resolution"] == 32
    assert main(["replay", "apple.glb", "-o", "again.glb"]) == 0
    assert "bit-identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["-o", "a.stl"], "glb"),
        (["--distill", "svd"], "one of sds, vsd, ism"),
        (["--iterations", "0"], "from 1"),
        (["--resolution", "7"], "from 24"),
        (["--views", "x"], "views"),
        (["--model", "nowhere"], "no model"),
    ],
)
def test_bad_input_is_refused_before_anything_heavy(tmp_path, words, expected):
    program = "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", program, "3d", "a chair", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"SUITE_DEBUG": ""},
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_the_object_as_it_is_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = FieldScene.updated

    def updated(self, progress):
        plain(self, progress)
        if self.iterations == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FieldScene, "updated", updated)
    words = ["3d", "a red apple", "-o", "apple.glb", "--model", PRIOR, "--iterations", "50", "--resolution", "32"]
    assert main([*words, "--views", "1", "--refine", "0"]) == 130
    assert "stopped: 1 of 1 finished and stay" in capsys.readouterr().err
    assert trimesh.load(tmp_path / "apple.glb", force="mesh").is_watertight
    assert len((tmp_path / "apple.glb.log.csv").read_text().splitlines()) == 2  # the names, and one whole iteration


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_a_plan_for_3d(name):
    plan = make_plan("3d", name)
    assert plan.folder.name and plan.recipe.guidance and ThreeD.work(plan.recipe.steps or 0, {}, 1) >= 200


def test_a_borrowed_model_gets_the_guidance_of_distillation_unless_told():
    assert make_plan("3d", "fast", model="emoji-64").recipe.guidance == 10
    assert make_plan("image", "fast", model="emoji-64").recipe.guidance == 3
    assert make_plan("3d", {"guidance": 5.0}, model="emoji-64").recipe.guidance == 5
