"""What results are called: nothing is replaced that a request did not name exactly, unless it says so."""

import json
from pathlib import Path

import pytest

from suite.files.output import another, free

STAYS = "not of this run"


@pytest.fixture
def draw(suite, model):
    """Run the fake modality; returns the outcome."""
    return lambda *words: suite("fake", *words, "--model", model, "--json")


def test_a_prompts_name_that_is_taken_gets_a_number(draw, here: Path):
    for name in ("apple.png", "apple-001.png", "apple-002.png"):
        assert draw("apple").json["files"] == [name]
    assert draw("apple", "--num", 2).json["files"] == ["apple-003.png", "apple-004.png"]
    before = (here / "apple.png").read_bytes()
    assert draw("apple", "--seed", 9, "--overwrite").json["files"] == ["apple.png"]
    assert (here / "apple.png").read_bytes() != before


def test_a_folder_goes_on_after_its_highest_number(draw, here: Path):
    (here / "d").mkdir()
    (here / "d" / "041.glb").write_text(STAYS)
    assert draw("apple", "--num", 2, "-o", "d").json["files"] == ["d/042.png", "d/043.png"]
    assert draw("apple", "-o", "d").json["files"] == ["d/044.png"]
    assert draw("apple", "-o", "d", "--overwrite").json["files"] == ["d/000.png"]
    assert (here / "d" / "041.glb").read_text() == STAYS


def test_several_go_on_after_a_name_and_one_is_exact(draw, here: Path):
    for first in (0, 2):
        done = draw("apple", "--num", 2, "-o", "a.png")
        assert done.json["files"] == [f"a-{first:03d}.png", f"a-{first + 1:03d}.png"]
    for _ in range(2):
        assert draw("apple", "-o", "a.png").json["files"] == ["a.png"]


def test_a_name_that_another_process_takes_meanwhile_is_left_to_it(draw, here: Path, monkeypatch):
    from suite.cli import job as cli_job

    opened = cli_job.open_engine

    def slow(*given):
        (here / "apple.png").write_text(STAYS)
        return opened(*given)

    monkeypatch.setattr(cli_job, "open_engine", slow)
    assert draw("apple", "--tone", "red").json["files"] == ["apple-001.png", "apple-001.png.note.txt"]
    assert sorted(p.name for p in here.iterdir()) == ["apple-001.png", "apple-001.png.note.txt", "apple.png"]
    assert (here / "apple.png").read_text() == STAYS


def test_a_file_beside_that_is_nobodys_is_not_replaced(draw, here: Path):
    note = here / "a.png.note.txt"
    note.write_text(STAYS)
    done = draw("apple", "--tone", "red", "-o", "a.png")
    assert done.code == 2 and "belongs to no a.png" in done.json["error"] and note.read_text() == STAYS
    assert draw("apple", "--tone", "red", "-o", "a.png", "--overwrite").code == 0
    assert draw("apple", "--tone", "red", "-o", "a.png").code == 0  # now it is the picture's
    assert note.read_text() == "red alone"


@pytest.mark.parametrize("name", ["data.json", "a.png", "a.png.note.txt", "./a.png"])
def test_a_report_replaces_reports_only(draw, here: Path, name: str):
    (here / "data.json").write_text('{"files": 1}')
    done = draw("apple", "-o", "a.png", "--report", name)
    assert done.code == 2 and "--report" in done.json["error"] and not (here / "a.png").exists()
    assert (here / "data.json").read_text() == '{"files": 1}'
    for _ in range(2):
        assert draw("apple", "-o", "b.png", "--report", "r.json").code == 0
    assert json.loads((here / "r.json").read_text())["files"] == ["b.png"]


def test_names_that_no_file_can_have_are_refused_before_the_work(draw, here: Path):
    for words in (["-o", f"{'a' * 250}.png"], ["-o", "a" * 5000], ["-o", f"{'a' * 300}/"], ["--report", "r" * 300]):
        done = draw("apple", *words)
        assert done.code == 2 and len(done.json["error"]) < 2000, words
    assert not list(here.iterdir())
    longest = "ä" * 118 + "a.png"  # 241 bytes, and .note.txt: 250
    assert draw("apple", "--tone", "red", "-o", longest).json["files"] == [longest, f"{longest}.note.txt"]


def test_a_prompt_of_any_letters_becomes_a_name(draw):
    (name,) = draw("𝔞" * 400, "--tone", "red").json["files"][:1]
    assert len(name.encode()) < 230


@pytest.mark.parametrize("name", ["pictures/", "pictures.png/"])
def test_a_folder_that_is_not_there_is_refused(draw, here: Path, name: str):
    done = draw("apple", "-o", name)
    assert done.code == 2 and f"mkdir -p {name}" in done.json["error"] and not list(here.iterdir())
    (here / name).mkdir()
    assert draw("apple", "-o", name).json["files"] == [f"{name}000.png"]


def test_a_replay_lies_beside_its_file_under_a_free_name(suite, draw, model, here: Path):
    folder = here / "sub"
    folder.mkdir()
    draw("apple", "-o", "sub/a.png")
    for name in ("a-replay.png", "a-replay-001.png"):
        assert suite("replay", "sub/a.png", "--model", model, "--json").json["files"] == [f"sub/{name}"]
    long = folder / f"{'ä' * 120}.png"
    (folder / "a.png").rename(long)
    done = suite("replay", long, "--model", model, "--json")
    assert done.code == 0 and Path(done.json["files"][0]).parent == folder


@pytest.mark.parametrize(
    "name, then",
    [("a.png", "a-010.png"), ("007.png", "010.png"), ("a-000.png", "a-010.png"), ("x9.png", "x9-001.png")],
)
def test_another_name(tmp_path: Path, name: str, then: str):
    (tmp_path / "009.png").touch()
    (tmp_path / "a-009.glb.preview.png").touch()  # of a result that came out empty
    assert another(tmp_path / name).name == then


def test_the_names_of_fitted_files_get_a_number_too(tmp_path: Path):
    """With a dash in between: the number at their end is that of the steps."""
    for name in ("grid-100.json", "grid-100-001.json", "grid-100-002.json"):
        assert free(tmp_path / "grid-100.json").name == name
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    "words",
    [
        ("schedule", "optimize", "image", "--method", "dm", "--steps", 4, "-o", f"{'g' * 300}.json"),
        ("cache", "calibrate", "magcache", "--steps", 4, "-o", f"{'c' * 300}.json"),
        ("train", "image", "--config", "c.yaml", "--data", "d", "--out", "o" * 300),
        ("bench", "quality", "image", "-o", "b" * 300),
    ],
)
def test_no_command_stumbles_over_a_long_name(suite, here: Path, words):
    (here / "c.yaml").write_text("a: 1")
    (here / "d").write_text("")
    done = suite(*words)
    assert done.code == 2 and any(say in done.err for say in ("bytes long", "does not exist")), done.err
    assert "Error" not in done.err and len(done.err) < 2000
