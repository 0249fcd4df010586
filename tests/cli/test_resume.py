"""`--resume`: what is there of the same request stays, the rest is made, and all is as in one run."""

from pathlib import Path

import pytest

ASKED = ("--num", 5, "--batch", 2)


@pytest.fixture
def draw(suite, model):
    """Run the fake modality; returns the outcome."""
    return lambda *words: suite("fake", "apple", "--model", model, *words, "--json")


@pytest.fixture
def whole(draw, here: Path):
    """The pixels of an uninterrupted run, by name."""
    (here / "w").mkdir()
    draw(*ASKED, "-o", "w")
    return pixels(here / "w")


def pixels(folder: Path) -> dict[str, bytes]:
    from PIL import Image

    out = {}
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as picture:
            out[file.name] = picture.tobytes()
    return out


def test_only_what_is_missing_is_made_and_all_is_as_in_one_run(draw, here: Path, whole):
    folder = here / "w"
    kept = (folder / "000.png").stat().st_mtime_ns
    (folder / "003.png").unlink()
    (folder / "004.png").unlink()
    done = draw(*ASKED, "-o", "w", "--resume")
    assert done.json["files"] == ["w/003.png", "w/004.png"]
    assert done.json["skipped"] == ["w/000.png", "w/001.png", "w/002.png"]
    assert [r["seeds"] for r in done.json["reports"]] == [[2, 3], [4]]  # whole batches: they decide the last bits
    assert pixels(folder) == whole and (folder / "000.png").stat().st_mtime_ns == kept
    again = draw(*ASKED, "-o", "w", "--resume")
    assert (again.code, again.json["files"], len(again.json["skipped"])) == (0, [], 5)


def test_a_name_with_several_is_resumed_too(draw, here: Path):
    draw(*ASKED, "-o", "a.png")
    (here / "a-001.png").unlink()
    assert draw(*ASKED, "-o", "a.png", "--resume").json["files"] == ["a-001.png"]


def test_what_is_cut_off_is_never_taken_for_whole(draw, here: Path, whole):
    file = here / "w" / "001.png"
    file.write_bytes(file.read_bytes()[:-30])
    done = draw(*ASKED, "-o", "w", "--resume")
    assert done.code == 2 and "001.png is no whole result" in done.json["error"]
    assert draw(*ASKED, "-o", "w", "--resume", "--overwrite").json["files"] == ["w/001.png"]
    assert pixels(here / "w") == whole


@pytest.mark.parametrize(
    "change, named",
    [
        (("--seed", 1), "seed 0, not 1"),
        (("--steps", 3), "recipe"),
        (("--negative", "green", "--guidance", 2), "negative '', not 'green'"),
        (("--shade", 0.5), "options"),
        (("--init", "w/000.png"), "init None"),
    ],
)
def test_another_request_is_refused_unless_it_may_replace(draw, here: Path, whole, change, named: str):
    done = draw(*ASKED, *change, "-o", "w", "--resume")
    assert done.code == 2 and "000.png is of another request" in done.json["error"] and named in done.json["error"]
    assert pixels(here / "w") == whole
    done = draw(*ASKED, *change, "-o", "w", "--resume", "--overwrite")
    assert done.code == 0 and len(done.json["files"]) == 5


def test_a_picture_of_others_is_refused(draw, here: Path):
    from PIL import Image

    (here / "w").mkdir()
    Image.new("RGB", (4, 4)).save(here / "w" / "002.png")
    before = (here / "w" / "002.png").read_bytes()
    done = draw(*ASKED, "-o", "w", "--resume")
    assert done.code == 2 and "002.png is no whole result" in done.json["error"]
    assert (here / "w" / "002.png").read_bytes() == before and len(list((here / "w").iterdir())) == 1


def test_without_a_place_it_is_refused(draw):
    done = draw(*ASKED, "--resume")
    assert done.code == 2 and "--resume needs -o" in done.json["error"]


def test_people_are_told(suite, model, here: Path, draw, whole):
    (here / "w" / "002.png").unlink()
    done = suite("fake", "apple", "--model", model, *ASKED, "-o", "w", "--resume")
    assert done.out == "w/002.png\n" and "skipped: 4 of 5 were there" in done.err
    assert done.code == 0
