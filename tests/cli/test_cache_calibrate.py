"""`suite cache calibrate`, the files that it writes, and what is refused before a model is loaded."""

import json

import pytest

from suite.fitting import cache_file
from suite.fitting.stamp import RunStamp
from suite.host.models import open_folder

QUICK = ("--modality", "image", "--steps", 3, "--samples", 1, "--check", 1, "--batch", 1, "--dtype", "fp32")
RUN = ("image", "a red heart", "--steps", 3, "--dtype", "fp32")


def test_a_calibration_is_made_and_used(suite, here):
    done = suite("cache", "calibrate", "magcache", *QUICK, "--json")
    assert done.code == 0, done.err
    file = here / done.json["file"]
    assert file.name == "magcache-emoji-64-3.json" and done.json["spread"] >= 0 and done.json["calls"] == 6
    content = cache_file.read(file, "magcache")
    assert content.stamp.steps == 3 and content.stamp.model == open_folder("emoji-64", "image").hash
    assert content.made["samples"] == 1 and content.made["method"] == "magcache:max_spread=0.2"
    use = f"magcache:file={file.name},threshold=9,retention=0"
    made = suite(*RUN, "--cache", use, "--json", "-o", "x.png")
    assert made.code == 0, made.err
    (row,) = [p for p in made.json["reports"][0]["plugins"] if p["hook"] == "cache"]
    assert row["did"] > 0 and row["facts"]["error_estimate"] > 0
    assert suite("replay", "x.png").code == 2, "a file that a result names is read only if its reader says so"
    again = suite("replay", "x.png", "--trust")
    assert again.code == 0, again.err
    for words, said in (
        (("--steps", 4), "fitted to 3 steps, not 4"),
        (("--solver", "ddim"), "the solver dpmpp-2m, not ddim"),
        (("--schedule", "uniform"), "the schedule beta:alpha=0.6,beta=0.6,of=t,high="),
        (("--compress", "int8"), "compress none, not int8"),
    ):
        rest = [*RUN, "--cache", use]
        if words[0] == "--steps":
            rest[3] = words[1]
            words = ()
        refused = suite(*rest, *words)
        assert refused.code == 2 and said in refused.err and "suite cache calibrate magcache" in refused.err


def test_a_poor_fit_is_refused(suite, here):
    done = suite("cache", "calibrate", "teacache:degree=1,min_r2=1", *QUICK)
    assert done.code == 2 and "R2 =" in done.err and "less than min_r2 = 1" in done.err
    assert not list(here.glob("*.json"))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("learned:epochs=1,penalty=1", "error_routed"),
        ("early-exit:epsilon=0.5,tolerance=0.3", "coverage"),
        ("block-cache:threshold=5,adjust=false", "reused_share"),
    ],
)
def test_what_is_trained_or_tried_on_the_engine(suite, here, method, said):
    name = method.partition(":")[0]
    done = suite("cache", "calibrate", method, *QUICK, "-o", "c.json")
    assert done.code == 0 and done.out == "c.json\n" and said in done.err, done.err
    made = suite(*RUN, "--cache", f"{name}:file=c.json", "--allow-noop", "-o", "x.png")
    assert made.code == 0, made.err


def stamped(here, method="teacache", **stamp):
    base = {"model": "0" * 64, "noise": "n", "solver": "s", "steps": 2, "schedule": "g", "compress": ""} | stamp
    content = cache_file.CacheFile(method, RunStamp(**base), (1.0, 0.5, 0.0), {"coefficients": [1.0], "range": [0, 1]})
    cache_file.write(here / "c.json", content)


def test_what_does_not_fit_is_refused(suite, here):
    run = ("image", "x", "--steps", 24, "--cache")  # a number of which none ships
    for plugin in ("teacache", "magcache", "block-cache"):
        done = suite(*run, plugin)
        assert done.code == 2 and f"suite cache calibrate {plugin} --modality image --model emoji-64" in done.err
    stamped(here)
    done = suite(*run, "teacache:file=c.json")
    assert done.code == 2 and "another model" in done.err and "2 steps, not 24" in done.err
    done = suite(*run, "magcache:file=c.json")
    assert done.code == 2 and "is for the cache teacache, not for magcache" in done.err
    (here / "c.json").write_text("{")
    done = suite(*run, "teacache:file=c.json")
    assert done.code == 2 and "is not JSON" in done.err
    done = suite(*run, "early-exit:file=absent.json")
    assert done.code == 2 and "no calibration 'absent.json'" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("teacahe",), "unknown method 'teacahe'; did you mean"),
        (("teacache:degree=99",), "degree = 99: expected 1 to 8"),
        (("teacache:rank=1",), "unknown option 'rank'"),
        (("teacache", "--steps", 1), "--steps 1: expected 2 to 10000"),
        (("teacache", "--samples", 0), "--samples 0"),
        (("teacache", "--check", 0), "--check 0"),
        (("teacache", "--batch", 0), "--batch 0"),
        (("teacache", "--solver", "dmid"), "unknown plugin 'dmid'"),
        (("teacache", "--solver", "dopri5"), "picks its own times"),
        (("teacache", "--modality", "3d"), "draws its times at random"),
        (("teacache", "--model", "nowhere"), "no model 'nowhere'"),
        (("teacache", "-o", "x.yaml"), "ends in .json"),
        (("teacache", "-o", "absent/x.json"), "does not exist"),
        (("teacache", "--prompt", "@absent.txt"), "absent.txt"),
    ],
)
def test_bad_input_is_refused_without_torch(launch, here, words, said):
    code = (
        "import sys; from suite.cli import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    process = launch("-c", code, "cache", "calibrate", *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and said in err and err.splitlines()[-1] == "False", err
    assert not list(here.glob("*.json"))


@pytest.mark.parametrize(
    ("modality", "model", "there"),
    [
        (
            "image",
            "emoji-64",
            {"teacache-50", "teacache-20", "learned-20", "magcache-50", "magcache-30", "magcache-20"},
        ),
        ("audio", "sound-16k", {"learned-50", "learned-20", "magcache-50", "magcache-20"}),
        ("video", "motion-64", {"teacache-50", "teacache-20", "magcache-50", "magcache-20"}),
    ],
)
def test_shipped_calibrations_are_of_the_shipped_model(modality, model, there):
    mine = {name: path for name, path in cache_file.shipped().items() if f"-{model}-" in name}
    assert there <= {name.replace(f"-{model}", "") for name in mine}
    for name, path in mine.items():
        content = cache_file.read(path, name.partition(f"-{model}")[0])
        assert content.stamp.model == open_folder(model, modality).hash
        assert content.stamp.steps == int(name.rsplit("-", 1)[1]) and json.dumps(dict(content.made))
        assert path.stat().st_size < 60_000
