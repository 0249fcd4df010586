"""Only regular files of bounded size are read, and every command says what is wrong with another."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from suite.cli import main
from suite.errors import ConfigError
from suite.files import inputs as input_file

READERS: list[Callable[[Path, str], object]] = [
    input_file.check,
    input_file.read_bytes,
    input_file.read_text,
    input_file.read_json,
    input_file.read_yaml,
]


def kinds(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(folder / "nothing")
    return {
        "a pipe": folder / "pipe",
        "a folder": folder,
        "a device": Path("/dev/zero"),
        "No such file": folder / "dangling",
        "too long": folder / ("n" * 300),
        "cannot be read": Path("a\0b"),
    }


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_read(read: Callable[[Path, str], object], tmp_path: Path) -> None:
    for why, path in kinds(tmp_path).items():
        with pytest.raises(ConfigError, match=why) as refused:
            read(path, "recipe")
        assert "recipe" in str(refused.value)


@pytest.mark.parametrize("read", [input_file.check, input_file.read_bytes, input_file.read_text])
def test_a_file_is_read_up_to_its_bound(read: Callable[[Path, str, int], object], tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 100)
    read(file, "a text", 100)
    with pytest.raises(ConfigError, match="larger than"):
        read(file, "a text", 99)


def test_files_that_hide_their_size_are_bounded() -> None:
    if not os.path.exists("/proc/kallsyms"):
        pytest.skip("needs a file that says it is empty and is not; only Linux has one, /proc/kallsyms")
    assert os.stat("/proc/kallsyms").st_size == 0
    with pytest.raises(ConfigError, match="larger than"):
        input_file.read_bytes(Path("/proc/kallsyms"), "a text", 1000)


def test_text_is_utf8_without_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert input_file.read_text(file, "a text") == "a\nb\nc\n"
    file.write_bytes(b"a\xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 text: .* at byte 1"):
        input_file.read_text(file, "a text")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (input_file.read_json, "[" * 100_000),
        (input_file.read_json, f"[{'1' * 10_000}]"),
        (input_file.read_yaml, "[" * 5_000),
        (input_file.read_yaml, f"steps: {'1' * 10_000}"),
        (input_file.read_yaml, "day: 2026-99-99"),
        (input_file.read_yaml, "a: &a [1, 2]\nb: [*a, *a]"),
    ],
)
def test_what_the_parsers_choke_on_is_refused(read: Callable[[Path, str], object], text: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"is not (JSON|YAML)|has an alias"):
        read(file, "recipe")


READING = [
    ["image", "@{0}"],
    ["image", "a red apple", "--recipe", "{0}"],
    ["image", "a red apple", "--model", "{0}"],
    ["image", "a red apple", "--init", "{0}"],
    ["image", "a red apple", "--schedule", "grid:file={0}"],
    ["image", "a red apple", "--cache", "teacache:file={0}"],
    ["text", "a word", "--init", "{0}"],
    ["replay", "{0}"],
    ["cache", "show", "{0}"],
    ["train", "image", "--config", "{0}", "--data", "{0}"],
]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
@pytest.mark.parametrize("suffix", ["", ".png", ".txt"])
def test_no_command_waits_for_a_pipe(arguments: list[str], suffix: str, tmp_path: Path, capsys) -> None:
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    codes: list[int] = []
    words = [word.format(pipe) for word in arguments]
    thread = threading.Thread(target=lambda: codes.append(main(words)), daemon=True)
    thread.start()
    thread.join(60)
    assert codes == [2], "it waits"
    out, err = capsys.readouterr()
    assert str(pipe) in err and not out
