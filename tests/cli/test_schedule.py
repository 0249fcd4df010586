"""`suite schedule optimize` and the grids that it writes."""

import json
from pathlib import Path

import pytest

from suite.errors import ConfigError
from suite.fitting import grid as grids
from suite.recipe import CONFIGS, Named

QUICK = ("--steps", 4, "--samples", 2, "--check", 2, "--reference", 8, "--solver", "ddim")
METHODS = {
    "ays": "ays:levels=8",
    "dp": "dp:levels=8",
    "dm": "dm",
    "search": "search:levels=8,population=2,generations=2",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_is_fitted_and_used(suite, model, here, method):
    done = suite("schedule", "optimize", "fake", "--model", model, "--method", METHODS[method], *QUICK, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    file = here / found["file"]
    assert file.name == f"fake-4-{method}-ddim-4.json"
    read = grids.read(str(file))
    assert list(read.times) == found["times"] and len(read.times) == 5
    assert read.stamp.solver == "ddim:eta=0.0" and read.stamp.steps == 4
    assert set(found["errors"]) == {"fitted", "beta"} and found["calls"] > 0
    assert read.made["errors"] == found["errors"] and read.made["method"].startswith(method)
    made = suite(
        "fake", "x", "--model", model, "--steps", 4, "--solver", "ddim", "--schedule", f"grid:file={file.name}"
    )
    assert made.code == 0, made.err
    again = suite("replay", "x.png", "--model", model, "--trust")
    assert again.code == 0, again.err


def test_equal_requests_give_equal_grids(suite, model, here):
    words = ("schedule", "optimize", "fake", "--model", model, "--method", "ays:levels=8", *QUICK, "-o")
    assert suite(*words, "one.json").code == 0 and suite(*words, "two.json").code == 0
    one, two = ((here / name).read_bytes() for name in ("one.json", "two.json"))
    assert one == two
    assert suite(*words, "three.json", "--batch", 1).code == 0
    first, third = (grids.read(str(here / name)).made["errors"] for name in ("one.json", "three.json"))
    assert first == pytest.approx(third, rel=1e-5)


def test_without_json_the_file_and_what_it_gains_are_printed(suite, model):
    done = suite("schedule", "optimize", "fake", "--model", model, "--method", "dm", *QUICK)
    assert (done.code, done.out) == (0, "fake-4-dm-ddim-4.json\n")
    assert "with fitted" in done.err and "with beta" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", 5), "fitted to 4 steps, not 5"),
        (("--solver", "dpmpp-2m"), "the solver ddim:eta=0.0, not dpmpp-2m"),
        (("--solver", "ddim:eta=0.5"), "the solver ddim:eta=0.0, not ddim:eta=0.5"),
    ],
)
def test_another_request_is_refused_before_anything_is_loaded(suite, model, words, said):
    suite("schedule", "optimize", "fake", "--model", model, "--method", "dm", *QUICK)
    base = ("fake", "x", "--model", model, "--steps", 4, "--solver", "ddim", "--schedule")
    done = suite(*base, "grid:file=fake-4-dm-ddim-4.json", *words)
    if words[0] == "--solver":  # the last of two counts as two
        rest = ("fake", "x", "--model", model, "--steps", 4, *words)
        done = suite(*rest, "--schedule", "grid:file=fake-4-dm-ddim-4.json")
    assert done.code == 2 and said in done.err and "suite schedule optimize fake" in done.err


def test_another_model_is_refused(suite, model, tmp_path):
    suite("schedule", "optimize", "fake", "--model", model, "--method", "dm", *QUICK)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    words = ("--steps", 4, "--solver", "ddim", "--schedule", "grid:file=fake-4-dm-ddim-4.json")
    done = suite("fake", "x", "--model", model, *words)
    assert done.code == 2 and "another model" in done.err


def test_the_solvers_options_by_default_are_the_same_solver(suite, model):
    suite("schedule", "optimize", "fake", "--model", model, "--method", "dm", *QUICK)
    words = ("--steps", 4, "--solver", "ddim:eta=0", "--schedule", "grid:file=fake-4-dm-ddim-4.json")
    assert suite("fake", "x", "--model", model, *words).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "asy"), "unknown method 'asy'; did you mean"),
        (("--method", "ays:levels=2"), "expected 8 to 4096"),
        (("--method", "ays:level=9"), "unknown option 'level'"),
        (("--steps", 1), "--steps 1: expected 2 to 10000"),
        (("--samples", 0), "--samples 0"),
        (("--reference", 1), "--reference 1"),
        (("--check", -1), "--check -1"),
        (("--batch", 0), "--batch 0"),
        (("--solver", "dmid"), "unknown plugin 'dmid'"),
        (("--method", "search", "--solver", "ddim:eta=1"), "draws noise"),
        (("-o", "absent/x.json"), "does not exist"),
        (("-o", "x.yaml"), "ends in .json"),
        (("--model", "nowhere"), "no model 'nowhere'"),
        (("--device", "tpu"), "expected cpu, cuda"),
        (("--prompt", "@absent.txt"), "absent.txt"),
    ],
)
def test_bad_input_is_refused_without_torch(launch, model, here, words, said):
    code = (
        "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    start = ("schedule", "optimize", "fake") + (() if "--model" in words else ("--model", model))
    process = launch("-c", code, *start, *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and said in err and err.splitlines()[-1] == "False", err
    assert not list(here.glob("*.json"))


def test_what_cannot_be_fitted_is_refused(suite):
    done = suite("schedule", "optimize", "text", "--method", "ays")
    assert done.code == 2 and "over tokens; use --method dp" in done.err
    done = suite("schedule", "optimize", "3d", "--method", "ays")
    assert done.code == 2 and "draws its times at random" in done.err


def test_more_steps_than_levels_is_refused(suite, model):
    done = suite("schedule", "optimize", "fake", "--model", model, "--method", "ays:levels=8", "--steps", 20)
    assert done.code == 2 and "take more levels" in done.err


# ---- the file ----------------------------------------------------------------------------------

STAMP = {"model": "a" * 64, "noise": grids.digest(None), "solver": "ddim:eta=0.0", "steps": 2}
GOOD = {"format": grids.FORMAT, "times": [1.0, 0.4, 0.0], "stamp": STAMP, "noise": None, "made": {}}


def test_a_file_is_read_as_it_was_written(tmp_path):
    grid = grids.GridFile(
        (1.0, 0.25, 0.0), grids.Stamp("m", grids.digest({"family": "flow"}), "s", 2), {"family": "flow"}
    )
    grids.write(tmp_path / "g.json", grid)
    assert grids.read(str(tmp_path / "g.json")) == grid
    assert [p.name for p in tmp_path.iterdir()] == ["g.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "is not a grid"),
        ({"stamp": {}}, "its stamp must give"),
        ({"stamp": STAMP | {"steps": "2"}}, "its stamp must give"),
        ({"times": "1, 0"}, "list of numbers"),
        ({"times": [1.0, True, 0.0]}, "list of numbers"),
        ({"times": [1.0, 0.0]}, "expected 2 \\+ 1 times that fall"),
        ({"times": [1.0, 1.0, 0.0]}, "expected 2 \\+ 1 times that fall"),
        ({"times": [0.9, 0.5, 0.0]}, "expected 2 \\+ 1 times that fall"),
        ({"times": [1.0, float("nan"), 0.0]}, "NaN is no number"),
        ({"noise": {"family": "flow"}}, "changed after it was stamped"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    (tmp_path / "g.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigError, match=said):
        grids.read(str(tmp_path / "g.json"))


def test_what_is_no_file_or_no_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="suite schedule optimize"):
        grids.read("nowhere.json")
    (tmp_path / "g.json").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        grids.read(str(tmp_path / "g.json"))


def test_a_solver_has_one_name(monkeypatch):
    assert grids.canonical(Named("deis")) == grids.canonical(Named("deis", {"order": "3", "variable": "t"}))
    assert grids.canonical(Named("deis", {"order": 2})) != grids.canonical(Named("deis"))


def test_the_shipped_grid_is_the_optimum_of_its_gaussian():
    from suite.diffusion.noise import Flow
    from suite.plugins.schedules.optimize._curves import nodes, snr
    from suite.plugins.schedules.optimize._path import best_path
    from suite.plugins.schedules.optimize.dp import bound_costs

    grid = grids.read("gaussian-flow-10")
    assert grids.shipped()["gaussian-flow-10"].parent == CONFIGS / "grids"
    times = nodes(Flow(), 400, 50.0, 0.02)
    path, total = best_path(bound_costs(Flow(), times, 0.25 / (0.25 * snr(Flow(), times) + 1)), 10)
    assert list(grid.times[:-1]) == pytest.approx(times[path[:-1]].tolist(), abs=1e-6)
    assert grid.made["objective"] == pytest.approx(total)


def test_a_grid_is_for_sampling_and_for_its_noise():
    from suite.diffusion.noise import Flow, VPLinear
    from suite.plugins.schedules.grid import Grid
    from suite.testing.oracles import a_run

    plugin = Grid("gaussian-flow-10")
    plugin.schedule(noise=Flow(), run=a_run(steps=10))
    with pytest.raises(ConfigError, match="10 steps, not 9"):
        plugin.schedule(noise=Flow(), run=a_run(steps=9))
    with pytest.raises(ConfigError, match="not to vp-linear"):
        plugin.schedule(noise=VPLinear(), run=a_run(steps=10))
    with pytest.raises(ConfigError, match="at random"):
        plugin.schedule(noise=Flow(), run=a_run(steps=10, mode="distill"))


def test_fitted_grids_warn_beside_caches_and_refuse_adaptive_solvers():
    from suite.host.plan import make_plan
    from suite.recipe import from_options
    from suite.rules import BOOK, Member, check

    plan = make_plan("image", overrides=from_options(schedule="ays", cache=["fora"]))
    assert any("rule C27" in warning for warning in plan.warnings)
    grid = Member("grid", "schedule", frozenset({"time-grid", "optimised-grid"}))
    adaptive = Member("adaptive", "solver", frozenset({"adaptive-grid"}))
    assert [f.rule.id for f in check([grid, adaptive], BOOK)] == ["C38b"]


SHIPPED = {
    "image": ("--model", "emoji-unet-32", "--method", "ays:levels=8"),
    "video": ("--method", "dm"),
    "audio": ("--method", "dp:levels=8"),
    "text": ("--method", "dp:levels=8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("modality", SHIPPED)
def test_it_runs_on_the_shipped_models(suite, here, modality):
    words = (*SHIPPED[modality], "--steps", 4, "--samples", 1, "--check", 1, "--reference", 6, "-o", "g.json", "--json")
    done = suite("schedule", "optimize", modality, *words)
    assert done.code == 0, done.err
    assert len(done.json["times"]) == 5
    assert bool(done.json["errors"]) == (modality != "text")
