"""The distribution holds the whole suite, under the one name it owns."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("plugins", "modalities", "kernels", "configs")


def build(source: Path, target: str, out: Path) -> Path:
    """Build with the installed hatchling: no isolated environment, hence no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sdist")
    sdist = build(ROOT, "sdist", work / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "tree", filter="data")
    (tree,) = (work / "tree").iterdir()
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel-from-sdist"))


def test_sdist_loses_nothing(wheel: Path, wheel_from_sdist: Path) -> None:
    # A walk that follows links only once would drop most of the linked folders without a word.
    assert members(wheel_from_sdist) == members(wheel)


def test_wheel_installs_only_suite(wheel: Path) -> None:
    top = {name.split("/")[0] for name in members(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"suite"}


@pytest.mark.parametrize("folder", LINKED)
def test_wheel_has_the_linked_folders(wheel: Path, folder: str) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so which files belong to it is unknown")
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert files, f"{folder}/ is empty"
    assert {f"suite/{name}" for name in files} <= members(wheel)


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "suite" / folder
    if not link.is_symlink():
        pytest.skip("unpacked from an sdist, which stores files in place of links")
    assert os.readlink(link) == f"../{folder}"
    # With an __init__.py the folder would be a second package, beside `suite`.
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_of_another_project_wins_over_ours(tmp_path: Path) -> None:
    # diffusers and transformers import a distribution called `kernels`; our folder must not shadow it,
    # even with the repository root in front on sys.path.
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("OWNER = 'theirs'\n")
    front = [str(ROOT), str(tmp_path)]
    code = f"import sys; sys.path[:0] = {front!r}; import kernels; print(kernels.OWNER)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "theirs", done.stderr


def test_kernels_alone_offers_no_code() -> None:
    # Without that distribution the name may resolve to an empty namespace, but to no file of ours.
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    origin = done.stdout.strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels"), done.stderr
