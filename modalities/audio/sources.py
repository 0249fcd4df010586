"""The clips of the training set: music of the MIT sound font, CC0 samples, and words spoken by Flite."""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from suite.errors import ConfigError
from suite.modalities.audio import effects, midi, music, speech
from suite.modalities.audio.mel import RATE, SAMPLES
from suite.modalities.shared.fetch import Archive, members

FONT = Archive(
    "apt", "fluid-soundfont-gm", "3.1-5.3", "MIT", "6f531493ac4e4d9772fd96b2488ea1790af81c196135fbdd25997da0781fc60e"
)
T = TypeVar("T")

ARCHIVES = (FONT, effects.SAMPLES)

GROUPS = ("music", "drums", "effects", "words", "digits")

PEAK = 0.8
FADE = 512
"""Samples over which the end of a clip fades out."""
_GAP = 2.25
"""Seconds from one phrase to the next while rendering: a clip and a little."""


@dataclass(frozen=True)
class Clip:
    """2.048 s of sound, float32 [32768]; its group; captions, most exact first; a label: instrument, word or name."""

    sound: NDArray[np.float32]
    group: str
    captions: tuple[str, ...]
    label: str
    name: str

    @property
    def held_out(self) -> bool:
        """Whether the clip is kept from training, for metrics: one in 25, by its name."""
        return zlib.crc32(self.name.encode()) % 25 == 0


def clips(font: Path, samples: Path, each: int = 125, beats: int = 320, every: int = 1) -> Iterator[Clip]:
    """All clips: `each` phrases an instrument, `beats` drum patterns, then effects and words.

    `font` and `samples` are the two archives. `every` keeps one of so many (for a quick look).
    """
    yield from _music(font, list(music.pieces(each, beats))[::every])
    yield from _effects(samples, every)
    yield from _words(list(speech.spoken())[::every])


def _music(archive: Path, pieces: list[music.Piece]) -> Iterator[Clip]:
    with tempfile.TemporaryDirectory() as folder:
        font = Path(folder) / "font.sf2"
        for _, content in members(archive, r"FluidR3_GM\.sf2$"):
            font.write_bytes(content)
        if not font.is_file():
            raise ConfigError(f"{archive} holds no FluidR3_GM.sf2: delete it and run the command again")
        number = 0
        for part in batched(pieces, 64):
            rendered = midi.render([p.phrase for p in part], font, _GAP, 2 * RATE)
            for piece, sound in zip(part, resampled(rendered, 2 * RATE), strict=True):
                group = "drums" if piece.label == "drums" else "music"
                yield Clip(finished(sound), group, piece.captions, piece.label, f"{group}/{number}")
                number += 1


def _effects(archive: Path, every: int) -> Iterator[Clip]:
    found = 0
    for k, effect in enumerate(effects.effects(archive)):
        found += 1
        for speed in effects.SPEEDS if k % every == 0 else ():
            # To the nearest 100 Hz, so that the resampler's filter stays short.
            rate = round(effect.rate * speed / 100) * 100
            sound = resampled(effect.samples[None, : int(SAMPLES / RATE * rate) + rate // 10], rate)[0]
            yield Clip(finished(sound), "effects", effect.captions, effect.label, f"effects/{k}/{speed}")
    if found < effects.EXPECTED:
        raise ConfigError(f"{archive} gave {found} captioned samples, expected {effects.EXPECTED}: delete it")


def _words(items: Iterable[speech.Spoken]) -> Iterator[Clip]:
    for item in items:
        name = f"words/{item.voice.flite}/{item.word}/{item.stretch}"
        lead = random.Random(name).randint(RATE * 5 // 100, RATE * 20 // 100)
        sound = np.concatenate([np.zeros(lead, np.float32), speech.speak(item)])
        group = "digits" if item.word in speech.DIGITS else "words"
        yield Clip(finished(sound), group, item.captions, item.word, name)


def resampled(sounds: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """[N, n] at `rate` -> [N, n 16000 / rate]."""
    from torchaudio.functional import resample

    return resample(torch.from_numpy(np.ascontiguousarray(sounds)), rate, RATE).numpy()


def finished(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut or padded to a clip, the end faded out, the highest sample at PEAK."""
    clip = np.zeros(SAMPLES, np.float32)
    clip[: min(len(sound), SAMPLES)] = sound[:SAMPLES]
    clip[-FADE:] *= np.cos(np.linspace(0, np.pi / 2, FADE, dtype=np.float32)) ** 2
    return clip * np.float32(PEAK / max(float(np.abs(clip).max()), 1e-6))


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of `size` items, the last one shorter."""
    return (items[k : k + size] for k in range(0, len(items), size))
