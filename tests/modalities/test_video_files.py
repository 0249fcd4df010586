"""Clips as files: every format keeps frames, opacity where it can, timing and metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from suite.errors import ConfigError
from suite.modalities.video import Video, files
from suite.modalities.video.files import SUFFIXES, Clip, check_suffix, read_frames, read_metadata, save

METADATA = {"suite": {"prompts": ["a “red” heart ❤"], "seeds": [3]}, "index": 0}


@pytest.fixture
def clip() -> Clip:
    """A red square that moves and fades, 7 frames of 16 px, half-transparent at its edge."""
    colour = np.full((7, 16, 16, 3), 255, np.uint8)
    opacity = np.zeros((7, 16, 16), np.uint8)
    for k in range(7):
        opacity[k, 4:12, k : k + 8] = 128
        opacity[k, 5:11, k + 1 : k + 7] = 255
        part = opacity[k, ..., None] / 255
        colour[k] = (np.array([200, 30, 10]) * part + 255 * (1 - part)).round()
    return Clip(colour, opacity, 8.0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_survives(suffix: str, clip: Clip, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    save(clip, path, METADATA)
    assert read_metadata(path) == METADATA


def test_suffixes_are_those_of_the_modality():
    assert Video.suffixes == SUFFIXES


@pytest.mark.parametrize(("suffix", "worst"), [(".webp", 0), (".frames", 0), (".gif", 12)])
def test_frames_survive(suffix: str, worst: int, clip: Clip, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    save(clip, path, METADATA)
    got = read_frames(path).astype(int)
    want = clip.straight() if suffix != ".gif" else np.dstack([clip.colour.reshape(-1, 16, 3)]).reshape(7, 16, 16, 3)
    assert got.shape[0] == 7
    seen = got[..., 3] > 0
    assert np.abs(got[..., :3] - want[..., :3])[seen].max() <= worst
    if suffix != ".gif":
        assert (got[..., 3] == clip.opacity).all()


def test_mp4_is_close_h264_and_repeats_the_loop(clip: Clip, tmp_path: Path):
    import av

    path = tmp_path / "x.mp4"
    save(Clip(clip.colour, clip.opacity, 7.5, loops=3), path, METADATA)
    got = read_frames(path)
    assert got.shape == (21, 16, 16, 3)
    assert np.abs(got[:7].astype(int) - clip.colour).mean() < 6  # colour is halved in H.264's usual format
    with av.open(str(path)) as box:
        assert box.streams.video[0].codec_context.name == "h264"
        assert float(box.streams.video[0].average_rate) == pytest.approx(7.5)
        assert box.duration / 1e6 == pytest.approx(21 / 7.5, abs=0.05)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_length_is_that_of_the_clip_and_it_repeats(suffix: str, clip: Clip, tmp_path: Path):
    path = tmp_path / f"x{suffix}"
    save(Clip(clip.colour, clip.opacity, 7.3), path, METADATA)
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        total = 0
        for k in range(picture.n_frames):
            picture.seek(k)
            picture.load()
            total += picture.info["duration"]
    assert total == pytest.approx(1000 * 7 / 7.3, abs=10)


def test_straight_colour_undoes_the_white(clip: Clip):
    straight = clip.straight()
    edge = clip.opacity == 128
    assert np.abs(straight[edge][:, :3].astype(int) - [200, 30, 10]).max() <= 2
    assert (straight[clip.opacity == 0][:, :3] == 255).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_compares_frames(suffix: str, clip: Clip, tmp_path: Path):
    a, b, c = (tmp_path / f"{name}{suffix}" for name in "abc")
    save(clip, a, METADATA)
    save(clip, b, {"other": "record"})
    save(Clip(clip.colour[::-1].copy(), clip.opacity[::-1].copy(), 8.0), c, METADATA)
    assert Video.same(a, b) and not Video.same(a, c)


def test_two_encodings_of_equal_frames_are_the_same_clip(clip: Clip, tmp_path: Path, monkeypatch):
    a, b, c = (tmp_path / f"{name}.mp4" for name in "abc")
    save(clip, a, METADATA)
    monkeypatch.setattr(files, "CRF", 20)
    save(clip, b, METADATA)
    assert (files.read_frames(a) != files.read_frames(b)).any() and Video.same(a, b)
    monkeypatch.setattr(files.hashlib, "sha256", lambda content: hashlib.blake2b(clip.colour.tobytes()))
    for target, frames in ((a, clip.colour), (c, clip.colour[::-1].copy())):
        save(Clip(frames, clip.opacity, 8.0), target, METADATA)
    assert files.digest(a) == files.digest(c) and not Video.same(a, c)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_foreign_and_broken_files_are_errors(suffix: str, clip: Clip, tmp_path: Path):
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(b"not a clip at all")
    with pytest.raises(ConfigError, match="not a readable clip"):
        read_metadata(broken)
    foreign = tmp_path / f"foreign{suffix}"
    save(clip, foreign, METADATA)
    if suffix == ".mp4":
        data = foreign.read_bytes().replace(b"\xa9cmt", b"\xa9xxx")
        foreign.write_bytes(data)
    else:
        Image.new("RGB", (4, 4)).save(foreign)
    with pytest.raises(ConfigError, match="holds no metadata"):
        read_metadata(foreign)


def test_a_folder_without_a_record_is_foreign(tmp_path: Path):
    (tmp_path / "x.frames").mkdir()
    with pytest.raises(ConfigError, match="holds no metadata"):
        read_metadata(tmp_path / "x.frames")


def test_folder_holds_its_rate(clip: Clip, tmp_path: Path):
    save(clip, tmp_path / "x.frames", METADATA)
    assert json.loads((tmp_path / "x.frames" / "metadata.json").read_text())["rate"] == 8.0
    assert len(list((tmp_path / "x.frames").glob("*.png"))) == 7


def test_missing_encoder_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch):
    class NoEncoder:
        codecs_available = frozenset({"mpeg4"})

    check_suffix(".mp4")
    check_suffix(".gif")
    monkeypatch.setattr(files, "pyav", lambda: NoEncoder)
    with pytest.raises(ConfigError, match=r"no H\.264 encoder"):
        Video.check_suffix(".mp4")


def test_sheets_keep_every_clip_in_its_place(clip: Clip, tmp_path: Path):
    from suite.modalities.video.sheet import on_white, save_sheet, sheet

    white = np.full_like(clip.colour, 255)
    page = sheet([white, white, clip.colour], columns=2, gap=4)
    assert page.shape == (7, 44, 44, 3)
    assert (page[:, 24:40, 4:20] == clip.colour).all() and (page[:, :24] == 255).all()
    assert np.abs(on_white(clip.straight()).astype(int) - clip.colour).max() <= 1
    save_sheet([clip.colour] * 3, tmp_path / "s.webp", columns=3)
    assert read_frames(tmp_path / "s.webp").shape[:3] == (7, 24, 64)


def test_equal_frames_give_equal_files(clip: Clip, tmp_path: Path):
    contents = set()
    for k in range(30):
        save(clip, tmp_path / f"{k}.mp4", METADATA)
        contents.add((tmp_path / f"{k}.mp4").read_bytes())
    assert len(contents) == 1
