"""The command line does what was asked, and says so in a form that a person and a program can read."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
from PIL import Image


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.tobytes()


def test_the_default_file_is_named_after_the_prompt(suite, here, model):
    done = suite("fake", "A red  apple, please!", "--model", model)
    assert (done.code, done.out, done.err) == (0, "a-red-apple-please.png\n", "")
    assert [f.name for f in here.iterdir()] == ["a-red-apple-please.png"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "x.png"], ["x-000.png", "x-001.png", "x-002.png"]),
        (["-o", "."], ["000.png", "001.png", "002.png"]),
        ([], ["apple-000.png", "apple-001.png", "apple-002.png"]),
    ],
)
def test_several_samples_are_numbered(suite, here, model, words, expected):
    assert suite("fake", "apple", "--num", 3, "--model", model, *words).code == 0
    assert sorted(f.name for f in here.iterdir()) == expected


def test_a_file_of_prompts(suite, here, model):
    (here / "prompts.txt").write_text("\ufeffa cat\n\n  a dog \na cat\n", encoding="utf-8")
    done = suite("fake", "@prompts.txt", "--model", model)
    assert done.out.split() == ["a-cat-000.png", "a-dog.png", "a-cat-001.png"]


def test_samples_do_not_depend_on_how_they_are_batched(suite, here, model):
    words = ["fake", "apple", "--num", 5, "--seed", 7, "--dtype", "fp32", "--model", model]
    suite(*words, "--batch", 5, "-o", "together.png")
    suite(*words, "--batch", 2, "-o", "apart.png")
    for k in range(5):
        assert pixels(here / f"together-00{k}.png") == pixels(here / f"apart-00{k}.png")
    assert len({pixels(here / f"apart-00{k}.png") for k in range(5)}) == 5


def test_json_is_the_only_output_and_the_report_file_holds_the_same(suite, here, model):
    words = ["fake", "apple", "--num", 3, "--batch", 2, "--model", model, "--json", "--report", "r.json"]
    done = suite(*words)
    assert done.json["files"] == ["apple-000.png", "apple-001.png", "apple-002.png"]
    assert [r["seeds"] for r in done.json["reports"]] == [[0, 1], [2]]
    assert json.loads((here / "r.json").read_text()) == done.json


def test_options_go_over_the_recipe_and_the_recipe_over_the_model(suite, here, model):
    def recipe(*words):
        return suite("fake", "apple", "--model", model, "--json", *words).json["reports"][0]["recipe"]

    assert recipe()["name"] == "balanced"
    (here / "own.yaml").write_text("summary: mine\nsteps: 6\nsolver: ddim\nschedule: karras:rho=5\n")
    own = recipe("--recipe", "own.yaml")
    assert (own["name"], own["steps"], own["schedule"], own["guidance"]) == ("own", 6, "karras:rho=5", 1.0)
    both = recipe("--recipe", "own.yaml", "--steps", "3", "--cache", "fake-count:interval=4,mode=fancy")
    assert (both["steps"], both["cache"]) == (3, ["fake-count:interval=4,mode=fancy"])


def test_advice_of_the_rules_is_a_warning(suite, here, model):
    done = suite("fake", "apple", "--model", model, "--cache", "fake-idle", "--steps", 4, "--allow-noop")
    assert done.code == 0
    assert done.err.startswith("warning: fake-idle") and "fewer than 8 steps" in done.err


def test_a_plugin_that_does_nothing_fails_the_run(suite, here, model):
    words = ["fake", "apple", "--model", model, "--cache", "fake-idle"]
    done = suite(*words)
    assert done.code == 3
    assert "fake-idle did nothing" in done.err and "--allow-noop" in done.err
    assert not list(here.iterdir())
    assert suite(*words, "--allow-noop").code == 0


def test_only_rank_zero_writes_and_prints(suite, here, model, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = suite("fake", "apple", "--model", model, "--report", "r.json")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert not list(here.iterdir())
    assert suite("fake", " ", "--model", model).err.startswith("error (rank 1): ")


def test_two_ranks_write_one_result(launch, here, model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = ["-m", "suite.cli", "fake", "apple", "--model", model, "--json"]
    ranks = [launch(*words, RANK=str(rank), **group) for rank in range(2)]
    (first, first_error), (second, second_error) = (r.communicate(timeout=120) for r in ranks)
    assert [r.returncode for r in ranks] == [0, 0], first_error + second_error
    assert json.loads(first)["reports"][0]["world"] == 2 and second == ""
    assert "destroy_process_group" not in first_error + second_error  # each rank left the process group
    assert [f.name for f in here.iterdir()] == ["apple.png"]


def test_ctrl_c_keeps_what_is_finished(launch, here, model):
    words = ["fake", "apple", "--num", 50, "--batch", 1, "--steps", 4, "--model", model, "--cache", "fake-slow"]
    started = launch("-m", "suite.cli", *words, "--report", "r.json")
    deadline = time.monotonic() + 60
    while not (here / "apple-001.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=30)
    assert started.returncode == 130, err
    files = sorted(f.name for f in here.glob("*.png"))
    assert 2 <= len(files) < 50
    assert out == ""
    assert err.splitlines() == [f"stopped: {len(files)} of 50 finished and stay", *files]
    assert all(pixels(here / f) for f in files)
    assert len(json.loads((here / "r.json").read_text())["files"]) == len(files)
    assert {f.name for f in here.iterdir()} == {*files, "r.json"}  # and no temporary file


def test_ctrl_c_in_json(suite, here, model, monkeypatch):
    from suite.engine.engine import Engine

    whole = Engine.generate_batch

    def second_stops(self, prompts, seeds, *, on_step, **options):
        def stop(step):
            on_step(step)
            if seeds[0] == 1 and step == 1:
                raise KeyboardInterrupt

        return whole(self, prompts, seeds, on_step=stop, **options)

    monkeypatch.setattr(Engine, "generate_batch", second_stops)
    done = suite("fake", "apple", "--num", 3, "--batch", 1, "--model", model, "--json")
    assert done.code == 130
    assert done.json["error"] == "stopped: 1 of 3 finished and stay"
    assert done.json["files"] == ["apple-000.png"] == [f.name for f in here.iterdir()]


def test_a_reader_that_leaves_is_no_error(launch):
    started = launch("-m", "suite.cli", "plugins", "list")
    started.stdout.close()
    assert started.wait(timeout=30) in (0, 1)
    assert started.stderr.read() == ""


def test_plugins_list(suite):
    done = suite("plugins", "list", "--json")
    rows = {r["name"]: r for r in done.json["plugins"]}
    assert rows["ddim"]["hooks"] == ["solver"] and rows["ddim"]["lossless"] is None
    assert rows["cfg"]["lossless"] is True and rows["first-block"]["lossless"] is False
    assert rows["fake-count"]["version"] == "1.2" and rows["fake-count"]["distribution"] == "fake-modality"
    assert "No module named 'fake_absent'" in rows["fake-absent"]["error"]
    text = suite("plugins", "list", "--hook", "cache").out
    assert "fake-count" in text and "ddim" not in text
    assert suite("plugins", "list").out.count("fake-absent") >= 1


def test_plugins_show(suite):
    text = suite("plugins", "show", "fake-count").out
    for expected in (
        "counts calls",
        "interval",
        "default 2",
        "exact-reuse",
        "reuses only what is equal",
        "fake.counting",
    ):
        assert expected in text
    shown = suite("plugins", "show", "fake-count", "--json").json
    assert [o["name"] for o in shown["options"]] == ["interval", "mode"]
    assert shown["options"][1]["type"] == "Literal['plain', 'fancy']"


def test_models_and_recipes(suite):
    names = [m["name"] for m in suite("models", "list", "--json").json["models"]]
    assert names and all(n in suite("models", "list").out for n in names)
    shown = suite("models", "show", names[0], "--json").json
    assert shown["modality"] == shown["facts"]["modality"] and len(shown["sha256"]) == 64
    assert names[0] in suite("models", "show", names[0]).out
    recipes = [r["name"] for r in suite("recipes", "list", "--json").json["recipes"]]
    assert set(recipes) >= {"reference", "quality", "balanced", "fast"}
    for name in recipes:
        assert "steps:" in suite("recipes", "show", name).out
        assert suite("recipes", "show", name, "--json").json["summary"]


def test_every_shipped_recipe_can_be_planned(suite, here, model):
    for recipe in ("reference", "quality", "balanced", "fast"):
        assert suite("fake", "apple", "--model", model, "--recipe", recipe).code == 0


def test_doctor(suite):
    done = suite("doctor", "--json")
    checks = {c["name"]: c for c in done.json["checks"]}
    assert {"python", "torch", "cpu", "memory", "disk", "text encoder"} <= checks.keys()
    assert checks["plugin fake-absent"]["state"] == "missing"
    assert all(c["fix"] for n, c in checks.items() if c["state"] != "ok" and not n.startswith("plugin"))
    assert done.code == int(any(c["state"] == "broken" for c in checks.values()))
    assert "torch" in suite("doctor").out


def test_doctor_finds_damage(suite, monkeypatch):
    from suite.host import doctor, models

    monkeypatch.setattr(models, "shipped", lambda: {"gone": {"modality": "fake", "path": "nowhere"}})
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["nothing-like-it>=3; extra == 'image'"])
    done = suite("doctor", "--json")
    checks = {c["name"]: c for c in done.json["checks"]}
    assert done.code == 1 and checks["model gone"]["state"] == "broken"
    missing = checks["nothing-like-it (image)"]
    assert (missing["state"], missing["fix"]) == ("missing", "pip install 'nothing-like-it>=3'")


def test_data_and_train_hand_over_to_the_modality(suite, here, monkeypatch):
    import sys
    import types

    calls = []
    data, training = types.ModuleType("fake_modality.data"), types.ModuleType("fake_modality.training")
    vars(data)["prepare"] = lambda **options: calls.append(options) or Path("made.bin")
    vars(training)["train"] = lambda *words, **options: calls.append((words, options)) or Path("model")
    suite("plugins", "list")
    import fake_modality

    monkeypatch.setattr(fake_modality, "__path__", [], raising=False)
    monkeypatch.setitem(sys.modules, "fake_modality.data", data)
    monkeypatch.setitem(sys.modules, "fake_modality.training", training)
    assert suite("data", "prepare", "fake", "--size", 8).out == "made.bin\n"
    for name in ("c.yaml", "d.bin"):
        (here / name).write_text("{}")
    words = ["train", "fake", "--config", "c.yaml", "--data", "d.bin", "--minutes", 2, "--set", "a.b=1", "--set", "c=2"]
    assert suite(*words).out == "model\n"
    given = (Path("c.yaml"), Path("d.bin"), Path("c"))
    assert calls == [{"size": 8}, (given, {"resume": False, "overrides": ("a.b=1", "c=2"), "minutes": 2.0})]


def test_help_and_version(suite):
    assert suite().out == suite("--help").out == suite("-h").out
    assert "fake" in suite("--help").out
    assert suite("--version").out.strip().count(".") == 2
