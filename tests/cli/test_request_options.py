"""Options that a modality declares are flags of its command, facts of its report, and part of a replay."""

import pytest
from PIL import Image


def test_flags_reach_the_modality(suite, here, model):
    done = suite("fake", "apple", "--model", model, "--rows", 2, "--tone", "red", "--shade", 0.5, "--json")
    assert done.code == 0, done.err
    assert done.json["reports"][0]["options"] == {"shade": 0.5, "big-noise": False, "tone": "red", "rows": 2}
    with Image.open(here / "apple.png") as picture:
        assert picture.size == (4, 2)
        assert all(picture.getpixel((x, y))[1:] == (128, 128) for x in range(4) for y in range(2))


def test_a_switch_takes_no_value(suite, here, model):
    plain = suite("fake", "apple", "--model", model, "--json", "-o", "a.png")
    loud = suite("fake", "apple", "--model", model, "--json", "-o", "b.png", "--big-noise")
    assert (plain.code, loud.code) == (0, 0)
    assert loud.json["reports"][0]["options"]["big-noise"] is True
    assert (here / "a.png").read_bytes() != (here / "b.png").read_bytes()


def test_help_lists_them(suite, here):
    done = suite("fake", "--help")
    assert "--shade X" in done.out and "--tone all|red" in done.out and "--big-noise" in done.out
    assert "[default: 0.0]" in done.out and "[default: the model's]" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shade", "2"], "--shade 2.0: expected a number from -1 to 1"),
        (["--rows", "5"], "--rows 5: expected a whole number from 1 to 4"),
        (["--rows", "few"], "'--rows'"),
        (["--tone", "read"], "--tone 'read': expected one of all, red"),
        (["--frames", "3"], "--frames"),
    ],
)
def test_bad_values_are_refused(suite, here, model, words, message):
    done = suite("fake", "apple", "--model", model, *words)
    assert done.code == 2 and message in done.err
    assert not list(here.iterdir())


def test_files_beside_are_written_and_listed(suite, here, model):
    done = suite("fake", "apple", "--model", model, "--tone", "red", "--json")
    assert done.json["files"] == ["apple.png", "apple.png.note.txt"]
    assert (here / "apple.png.note.txt").read_text() == "red alone"


def test_replay_asks_for_the_same(suite, here, model):
    assert suite("fake", "apple", "--model", model, "--rows", 3, "--shade", 0.2).code == 0
    again = suite("replay", "apple.png", "--model", model, "-o", "again.png")
    assert (again.code, again.out) == (0, "again.png is bit-identical to apple.png\n")


def test_a_printable_modality_prints(suite, here, model, monkeypatch):
    from fake_modality import Fake

    monkeypatch.setattr(Fake, "printable", True)
    monkeypatch.setattr(Fake, "show", lambda self, artifact: f"{artifact.width} by {artifact.height}")
    done = suite("fake", "apple", "--num", 2, "--model", model, "--report", "r.json")
    assert (done.code, done.out) == (0, "4 by 4\n4 by 4\n")
    assert [f.name for f in here.iterdir()] == ["r.json"]
    assert suite("fake", "apple", "--model", model, "--json").json["texts"] == ["4 by 4"]
    assert suite("fake", "apple", "--model", model, "-o", "a.png").out == "a.png\n"


def test_the_python_interface_takes_them_too(here, model):
    from suite import Engine
    from suite.errors import ConfigError

    with Engine.from_recipe(modality="fake", model=str(model)) as engine:
        result = engine.generate("apple", options={"rows": 1})
        assert result.artifacts[0].size == (4, 1)
        with pytest.raises(ConfigError, match="has no option 'frames'"):
            engine.generate("apple", options={"frames": 1})
