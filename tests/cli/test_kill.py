"""kill -9 of a batch at random moments, then --resume."""

import random
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_killed_batch_is_ended_by_resume(suite, launch, model, here: Path):
    import fake_modality
    from PIL import Image

    def pixels(folder: Path) -> list[bytes]:
        return [Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))]

    asked = ["fake", "apple", "--model", model, "--num", 120, "--batch", 4, "--tone", "red"]
    for name in ("whole", "killed"):
        (here / name).mkdir()
    assert suite(*asked, "-o", "whole").code == 0
    for attempt in range(4):
        before = len(list((here / "killed").glob("*.png")))
        process = launch("-m", "suite.cli", *asked, "-o", "killed", "--resume")
        until = time.monotonic() + 60
        while len(list((here / "killed").glob("*.png"))) == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(random.Random(attempt).uniform(0, 0.3))
        process.kill()
        process.wait()
        for file in (here / "killed").glob("*.png"):
            assert fake_modality.Fake.read_whole(file)
            assert file.with_name(f"{file.name}.note.txt").read_text() == "red alone"
    done = suite(*asked, "-o", "killed", "--resume")
    assert done.code == 0, done.err
    assert pixels(here / "killed") == pixels(here / "whole") and len(pixels(here / "killed")) == 120
    assert not list((here / "killed").glob(".suite-*"))
