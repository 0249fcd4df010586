"""Standard MIDI files, written from lists of notes, and sound made from them by FluidSynth."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from suite.errors import ConfigError

DRUMS = 9
"""The MIDI channel on which General MIDI keeps drums."""

_TICKS = 1000
"""Ticks a second: one quarter note lasts one second, so that a time in seconds is a time in ticks."""


@dataclass(frozen=True)
class Note:
    """One note: `start` and `length` in seconds, MIDI `key` and `velocity` (1 to 127), `channel` (0 to 15)."""

    start: float
    length: float
    key: int
    velocity: int = 96
    channel: int = 0


@dataclass(frozen=True)
class Phrase:
    """Notes, and the General MIDI program of each channel that they use (on the drum channel, the kit)."""

    notes: tuple[Note, ...]
    programs: tuple[tuple[int, int], ...]


def write_midi(phrases: Sequence[Phrase], every: float) -> bytes:
    """A MIDI file of one track in which phrase k starts at k x `every` seconds and is cut before the next."""
    events: list[tuple[int, int, bytes]] = [(0, 0, b"\xff\x51\x03" + (1_000_000).to_bytes(3, "big"))]
    for k, phrase in enumerate(phrases):
        begin = k * every
        for channel, program in phrase.programs:
            events.append((round(begin * _TICKS), 1, bytes((0xC0 | channel, program))))
        for note in phrase.notes:
            on, off = begin + 0.01 + note.start, begin + 0.01 + note.start + note.length
            events.append((round(on * _TICKS), 2, bytes((0x90 | note.channel, note.key, note.velocity))))
            events.append((round(off * _TICKS), 1, bytes((0x80 | note.channel, note.key, 0))))
        stop = round((begin + every) * _TICKS) - 5
        for channel, _ in phrase.programs:
            events.append((stop, 3, bytes((0xB0 | channel, 120, 0))))  # all sound off: no tail in the next phrase
    body = b"".join(_track(sorted(events, key=lambda e: e[:2])))
    return struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, _TICKS, b"MTrk", len(body)) + body


def _track(events: Iterable[tuple[int, int, bytes]]) -> Iterable[bytes]:
    now = 0
    for tick, _, message in events:
        yield _variable(tick - now) + message
        now = tick
    yield b"\x00\xff\x2f\x00"


def _variable(number: int) -> bytes:
    """A MIDI variable-length quantity: seven bits a byte, the high bit set on all but the last."""
    out = [number & 0x7F]
    while number := number >> 7:
        out.append(0x80 | (number & 0x7F))
    return bytes(reversed(out))


def render(phrases: Sequence[Phrase], font: Path, every: float, rate: int = 32_000) -> NDArray[np.float32]:
    """Mono sound [len(phrases), every x rate] of the phrases, dry: without reverberation and chorus.

    Raises ConfigError when the program fluidsynth is missing or fails.
    """
    program = shutil.which("fluidsynth")
    if program is None:
        raise ConfigError(
            "Music is rendered by the program fluidsynth, which is not installed. Type: apt-get install fluidsynth "
            "(macOS: brew install fluid-synth; or see fluidsynth.org)"
        )
    with tempfile.TemporaryDirectory() as folder:
        score, sound = Path(folder) / "score.mid", Path(folder) / "sound.wav"
        score.write_bytes(write_midi(phrases, every))
        options = ["-n", "-i", "-q", "-R", "0", "-C", "0", "-g", "0.5", "-r", str(rate), "-O", "float"]
        done = subprocess.run(
            [program, *options, "-F", str(sound), str(font), str(score)], capture_output=True, text=True, check=False
        )
        if done.returncode or not sound.is_file():
            raise ConfigError(f"fluidsynth failed with status {done.returncode}: {done.stderr.strip()[-200:]}")
        samples, got = soundfile.read(sound, dtype="float32", always_2d=True)
    if got != rate:
        raise ConfigError(f"fluidsynth wrote {got} Hz, expected {rate} Hz")
    length = round(every * rate)
    wanted = length * len(phrases)
    mono = np.zeros(wanted, np.float32)
    kept = samples[:wanted].mean(1)
    mono[: len(kept)] = kept
    return mono.reshape(len(phrases), length)
