"""`suite bench solvers` and `suite bench caches`: refused without torch, measured on models, gone on with."""

import csv
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

PROBE = (
    "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
    "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
)
SOLVERS = ("bench", "solvers")
CACHES = ("bench", "caches")
SHIPPED = ("image", "--model", "emoji-unet-32")
PLOTS = find_spec("matplotlib") is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SOLVERS, "fake", "--solver", "dmid"), "unknown plugin 'dmid'"),
        ((*SOLVERS, "fake", "--solver", "deis:order=9"), "deis: order"),
        ((*SOLVERS, "fake", "--solver", "ancestral"), "--solver ancestral draws noise"),
        ((*SOLVERS, "fake", "--solver", "dopri5"), "decides from the data how often it evaluates"),
        ((*SOLVERS, "fake", "--solver", "uniform"), "does not implement the hook 'solver'"),
        ((*SOLVERS, "fake", "--schedule", "uniformly"), "unknown plugin 'uniformly'"),
        ((*SOLVERS, "fake", "--schedule", "grid:file=absent.json"), "absent.json"),
        ((*SOLVERS, "fake", "--evaluations", "5,x"), "expected whole numbers from 1 to 10000, like 5,10,20"),
        ((*SOLVERS, "fake", "--evaluations", "0"), "--evaluations '0'"),
        ((*SOLVERS, "fake", "--reference", 99), "at least twice the most --evaluations, 50"),
        ((*SOLVERS, "fake", "--reference-solver", "sa"), "--reference-solver sa draws noise"),
        ((*SOLVERS, "fake", "--samples", 0), "--samples 0"),
        ((*SOLVERS, "fake", "--batch", 0), "--batch 0"),
        ((*SOLVERS, "fake", "--seed", -1), "seed = -1"),
        ((*SOLVERS, "fake", "--prompt", "@absent.txt"), "absent.txt"),
        ((*SOLVERS, "fake", "--device", "tpu"), "expected cpu, cuda"),
        ((*SOLVERS, "fake", "--model", "nowhere"), "no model 'nowhere'"),
        ((*SOLVERS, "fake", "-o", "absent"), "the folder absent does not exist"),
        ((*SOLVERS, "text", "--model", "gloss-masked"), "is over tokens"),
        ((*SOLVERS, "3d"), "draws its times at random"),
        ((*SOLVERS, "fkae"), "unknown modality 'fkae'; did you mean"),
        ((*CACHES, "fake", "--cache", "foar"), "unknown plugin 'foar'"),
        ((*CACHES, "fake", "--cache", "fora:interval=0"), "expected at least 1"),
        ((*CACHES, "fake", "--cache", "ddim"), "does not implement the hook 'cache'"),
        ((*CACHES, "fake", "--steps", "20;50"), "--steps '20;50'"),
        ((*CACHES, "fake", "--rounds", 0), "--rounds 0"),
        ((*CACHES, "fake", "--solver", "ddim", "--solver", "heun"), "--solver is given 2 times"),
        ((*CACHES, "fake", "--solver", "dopri5"), "picks its own times"),
        ((*CACHES, "3d"), "draws its times at random"),
    ],
)
def test_bad_input_is_refused_without_torch(launch, model, here, words, said):
    own = () if "--model" in words or words[2] != "fake" else ("--model", model)
    process = launch("-c", PROBE, *words, *own)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and said in err and err.splitlines()[-1] == "False", err
    assert not list(here.iterdir())


def solvers(suite, *words):
    return suite(
        *SOLVERS, *SHIPPED, "--solver", "ddim", "--solver", "unipc", "--schedule", "log-snr", "--reference", 16,
        "--samples", 2, "--prompt", "a red apple", *words,
    )  # fmt: skip


def test_solvers_are_measured_and_written(suite, here, monkeypatch):
    done = solvers(suite, "--evaluations", "3,6", "--json")
    assert done.code == 0 and (PLOTS or "matplotlib is missing" in done.err), done.err
    found = done.json
    assert found == json.loads((here / "solvers.json").read_text())
    assert {"format", "bench", "request", "reference", "rows", "left_out", "made", "checksum"} == set(found)
    cells = [(r["solver"], r["schedule"], r["budget"]) for r in found["rows"]]
    assert cells == [(s, "log-snr", b) for s in ("ddim", "unipc") for b in (3, 6)]
    for row in found["rows"]:
        assert row["steps"] == row["evaluations"] == row["budget"] and row["evaluations"] <= row["nfe"]
        assert 0 < row["error"] < 1 and 0 < row["stderr"] < 1
    assert found["request"]["seeds"] == [0, 1] and found["reference"]["evaluations"] == 16
    with (here / "solvers.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [float(r["error"]) for r in table] == [r["error"] for r in found["rows"]]
    assert (here / "solvers.png").exists() == PLOTS

    # Going on measures only what is new, and a reference that is there is not made again.
    from suite.bench.solvers import SolverBench
    from suite.fitting.grid_fit import ModelProblem

    measured, sampled = [], []
    measure, sample = SolverBench._measure, ModelProblem.sample
    monkeypatch.setattr(SolverBench, "_measure", lambda self, *cell: measured.append(cell) or measure(self, *cell))
    monkeypatch.setattr(ModelProblem, "sample", lambda self, *a: sampled.append(a[0]) or sample(self, *a))
    again = solvers(suite, "--evaluations", "3,4,6", "--resume", "--json")
    assert again.code == 0, again.err
    assert measured == [("ddim", "log-snr", 4), ("unipc", "log-snr", 4)]
    assert sampled == ["ddim, log-snr, 4 evaluations", "unipc, log-snr, 4 evaluations"]
    assert all(row in again.json["rows"] for row in found["rows"]) and len(again.json["rows"]) == 6

    assert solvers(suite, "--evaluations", "3").code == 2  # what lies there is not lost without a word
    other = solvers(suite, "--evaluations", "3", "--guidance", 2, "--resume")
    assert other.code == 2 and "was measured with guidance = 3.0, not 2.0" in other.err


def test_a_solver_that_evaluates_twice_gets_half_the_steps(suite, model):
    words = (*SOLVERS, "fake", "--model", model, "--schedule", "karras", "--reference", 40, "--json")
    done = suite(*words, "--solver", "dpmpp-2s", "--solver", "heun", "--solver", "dpm:order=3", "--evaluations", "9")
    rows = {row["solver"]: row for row in done.json["rows"]}
    assert [rows[name]["steps"] for name in ("dpmpp-2s", "heun", "dpm:order=3")] == [
        5,
        5,
        4,
    ]  # their ends are first-order steps
    assert all(row["evaluations"] <= 9 for row in rows.values())


def test_by_default_every_deterministic_solver_and_every_grid(suite, here, model):
    words = (*SOLVERS, "fake", "--model", model, "--evaluations", "10", "--reference", 20, "--samples", 1, "--json")
    done = suite(*words, "--schedule", "karras")
    assert done.code == 0, done.err
    measured = {row["solver"] for row in done.json["rows"]}
    assert {"ddim", "heun", "unipc:order=2", "unipc:order=3", "deis:order=3", "dpmpp-2m"} <= measured
    assert "euler" not in measured and "ancestral" not in measured and "diffusers" not in measured
    assert all(row["stderr"] is None for row in done.json["rows"])  # one sample has no spread
    why = {entry["solver"]: entry["reason"] for entry in done.json["left_out"]}
    assert "draws noise" in why["ancestral"] and "how often it evaluates" in why["dopri5"]
    (here / "solvers.json").unlink()
    done = suite(*words, "--solver", "ddim")
    assert {"log-snr", "karras", "beta"} <= {row["schedule"] for row in done.json["rows"]}
    why = {entry["schedule"]: entry["reason"] for entry in done.json["left_out"]}
    assert "its times are those of" in why["uniform"] and "grid" not in {row["schedule"] for row in done.json["rows"]}


def test_without_json_a_table_is_printed(suite, model):
    words = ("--solver", "ddim", "--schedule", "karras", "--evaluations", "2,4", "--reference", 8)
    done = suite(*SOLVERS, "fake", "--model", model, *words)
    lines = done.out.splitlines()
    assert lines[0].split() == ["solver", "schedule", "2", "4"] and lines[1].startswith("ddim") and "*" in lines[1]
    assert lines[-1] == "solvers.json"


def test_caches_are_measured_beside_fewer_steps(suite, here, monkeypatch):
    words = (*CACHES, *SHIPPED, "--steps", "8", "--rounds", 1, "--samples", 1, "--prompt", "a red apple")
    done = suite(*words, "--cache", "fora:interval=2", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    (cached,) = [row for row in rows if row["cache"]]
    assert cached["skipped_share"] == pytest.approx(4 / 8) and cached["bytes_held"] > 0 and cached["did"] > 0
    assert 0 < cached["error"] < 1 and len(cached["seconds"]) == len(cached["uncached"]) == 1
    assert cached["ratio_low"] <= cached["ratio"] <= cached["ratio_high"]
    (plain,) = [row for row in rows if not row["cache"] and row["run_steps"] == 8]
    assert plain["error"] == 0
    fewer = [row for row in rows if not row["cache"] and row["run_steps"] < 8]
    assert [row["run_steps"] for row in fewer][:3] == [7, 6, 5] and all(row["error"] > 0 for row in fewer)
    steps = cached["same_time_steps"]
    if steps is not None and steps < 8:
        (same,) = [row for row in fewer if row["run_steps"] == steps]
        assert cached["same_time_error"] == same["error"]
    assert (here / "caches.csv").exists() and (here / "caches.png").exists() == PLOTS

    from suite.bench.caches import CacheBench

    ran = []
    once = CacheBench._once
    monkeypatch.setattr(CacheBench, "_once", lambda self, plan, n: ran.append(plan.recipe.cache) or once(self, plan, n))
    again = suite(*words, "--cache", "first-block:threshold=0.1", "--resume", "--json")
    assert again.code == 0 and again.json["left_out"]  # a U-Net's blocks are no chain
    assert all(row in again.json["rows"] for row in [cached, plain]) and len(ran) == 1


def test_caches_by_quality_alone(suite, here):
    words = (*CACHES, *SHIPPED, "--steps", "5", "--samples", 4, "--prompt", "a red apple")
    done = suite(*words, "--cache", "fora:interval=2", "--rounds", 0, "--metric")
    assert done.code == 0, done.err
    heading, *lines, note, file = done.out.splitlines()
    assert heading.split() == ["steps", "run", "error", "skipped", "frechet", "alignment"] and file == "caches.json"
    assert lines[0].split()[1:4] == ["5", "steps", "0"] and lines[0].count("(+0.0%)") == 2 and "better" in note
    rows = json.loads((here / file).read_text())["rows"]
    (cached,) = [row for row in rows if row["cache"]]
    plain, other = [row for row in rows if row["run_steps"] == 5 and not row["cache"]]
    assert other["other_seeds"] and other["metrics"] != plain["metrics"] and "other seeds" in lines[-1]
    assert cached["seconds"] == [] and "ratio" not in cached and not (here / "caches.png").exists()
    change = (plain["metrics"]["frechet"] - cached["metrics"]["frechet"]) / plain["metrics"]["frechet"]
    (line,) = [line for line in lines if "fora" in line]
    assert f"{cached['metrics']['frechet']:.4g} ({change:+.1%})" in line  # less is better
    assert suite(*words, "--cache", "fora", "--rounds", 0, "-o", "other").code == 2  # nothing would be measured


# ---- what the numbers are made of --------------------------------------------------------------


def test_the_error_and_its_spread():
    import torch

    from suite.fitting.grid_fit import relative_error

    exact = [torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[4.0, -3.0]])]
    equal = [x * 1.1 for x in exact]
    assert relative_error(equal, exact) == pytest.approx((0.1, 0.0), abs=1e-6)
    away = [exact[0] + torch.tensor([[3.0, 0.0], [0.0, 0.0]]), exact[1]]
    error, spread = relative_error(away, exact)
    assert error == pytest.approx(math.sqrt(9 / 75))
    # Jackknife of sqrt(mean) with one sample of 9 / 25 and two of 0: sqrt of 2/3 of the sum of squares about the mean.
    left = [0.0, math.sqrt(9 / 50), math.sqrt(9 / 50)]
    mean = sum(left) / 3
    assert spread == pytest.approx(math.sqrt(2 / 3 * sum((v - mean) ** 2 for v in left)))
    assert relative_error([exact[1]], [exact[1]]) == (0.0, None)
    tokens = [torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])]
    assert relative_error([torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]])], tokens)[0] == pytest.approx(1 / 8)


def test_the_references_grid_stops_at_both_sides_of_an_edge():
    from suite.bench.solvers import EDGE, FLOOR, reference_grid
    from suite.diffusion.noise import VE, Cosine, Flow

    for noise in (Flow(), Cosine(), VE()):
        times = reference_grid(noise, 100, (0.3, 0.8)).tolist()
        assert times[0] == 1 and times[-1] == 0 and times == sorted(set(times), reverse=True)
        assert 100 <= len(times) <= 106
        for edge, outside in ((0.3, 0.3 - EDGE), (0.8, 0.8 + EDGE)):
            assert edge in times and outside in times
        ratio = math.exp(-float(noise.log_snr(times[-2])) / 2)
        assert ratio == pytest.approx(FLOOR, rel=0.01)
        assert times[-2] == reference_grid(noise, 100, (times[-2] / 2, 1.0)).tolist()[-2]  # no stop below the floor


def test_a_finer_reference_is_nearer_to_the_truth():
    # On a Gaussian the flow is known: x0 = x deviation / size of the prior, once the last step is left out.
    import torch

    from suite.bench.solvers import reference_grid
    from suite.diffusion.noise import Flow
    from suite.plugins.solvers.heun import Heun
    from suite.testing import Gaussian, drive
    from suite.testing.oracles import a_run

    noise, target = Flow(), Gaussian()
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    solver = Heun().solver(noise=noise, run=a_run(steps=10))
    ends = [drive(solver, reference_grid(noise, n, (0.0, 1.0)), target.denoiser(noise), x) for n in (20, 40, 80, 320)]
    away = [float((e - ends[-1]).abs().max()) for e in ends[:-1]]
    assert away[0] > 3 * away[1] > 9 * away[2]


def test_steps_of_the_same_time():
    from suite.bench.caches import quartiles, steps_in

    curve = {10: 1.0, 5: 0.55, 2: 0.28}  # 0.1 for what every run does, and 0.09 a step
    assert [steps_in(r, curve) for r in (1.2, 1.0, 0.99, 0.56, 0.55, 0.3, 0.27, 0.19)] == [10, 10, 9, 5, 5, 2, 1, 1]
    assert steps_in(0.1, curve) is None
    assert [steps_in(r, {4: 1.0, 3: 0.7, 2: 0.8, 1: 0.2}) for r in (0.74, 0.76)] == [1, 3]  # both took 0.75
    assert quartiles([1.0]) == (1.0, 1.0) and quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_a_loaded_model_goes_under_another_plan_only_if_it_fits(here: Path, model: Path):
    from suite import Engine
    from suite.errors import ConfigError
    from suite.host.plan import make_plan
    from suite.recipe import from_options

    def plan(**options):
        return make_plan("fake", overrides=from_options(dtype="fp32", **options), model=str(model))

    with Engine(plan(steps=4)) as engine:
        fewer = engine.under(plan(steps=2, solver="heun"))
        assert fewer.generate("x").report.steps == 2 and engine.generate("x").report.steps == 4
        with pytest.raises(ConfigError, match="load it anew"):
            engine.under(plan(steps=4, compress=["int8"]))
        with Engine(plan(steps=2, solver="heun")) as fresh:
            assert fresh.generate("x").content.equal(fewer.generate("x").content)
