"""Captioned drums, loops and effects: the CC0 samples that supersonic-scsynth-samples carries."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from suite.errors import ConfigError
from suite.modalities.audio.music import article
from suite.modalities.shared.fetch import Archive, members

SAMPLES = Archive(
    "npm",
    "supersonic-scsynth-samples",
    "0.84.2",
    "CC0-1.0",
    "aff0b03208adb5dc7612dc7a4e86d55161188326bcff4dbc2d20ce9e1b94238c",
)

EXPECTED = 180
"""Fewer captioned files than this mean another archive."""

FAMILIES = {
    "ambi": "ambient sound",
    "arovane_beat": "electronic drum loop",
    "bass": "synth bass hit",
    "bd": "bass drum",
    "elec": "electronic percussion sound",
    "glitch": "glitch sound",
    "guit": "electric guitar sample",
    "hat": "hi-hat",
    "loop": "drum loop",
    "mehackit_phone": "telephone sound effect",
    "mehackit_robot": "robot sound effect",
    "perc": "percussion sound",
    "ride": "ride cymbal",
    "sn": "snare drum",
    "tabla": "tabla drum hit",
    "vinyl": "vinyl record sound",
}
"""First part of a file name, and what it is in words."""

NAMED = {
    "ambi_choir": "ambient choir",
    "ambi_dark_woosh": "dark whoosh",
    "ambi_drone": "ambient drone",
    "ambi_glass_hum": "humming glass",
    "ambi_glass_rub": "rubbed glass",
    "ambi_haunted_hum": "haunted hum",
    "ambi_piano": "ambient piano",
    "ambi_swoosh": "soft swoosh",
    "bd_808": "electronic bass drum",
    "drum_bass_hard": "hard bass drum",
    "drum_bass_soft": "soft bass drum",
    "drum_cowbell": "cowbell",
    "drum_cymbal_closed": "closed hi-hat cymbal",
    "drum_cymbal_hard": "hard cymbal crash",
    "drum_cymbal_open": "open hi-hat cymbal",
    "drum_cymbal_pedal": "pedal hi-hat cymbal",
    "drum_cymbal_soft": "soft cymbal",
    "drum_heavy_kick": "heavy kick drum",
    "drum_roll": "drum roll",
    "drum_snare_hard": "hard snare drum",
    "drum_snare_soft": "soft snare drum",
    "drum_splash_hard": "hard splash cymbal",
    "drum_splash_soft": "soft splash cymbal",
    "drum_tom_hi_hard": "hard high tom drum",
    "drum_tom_hi_soft": "soft high tom drum",
    "drum_tom_lo_hard": "hard low tom drum",
    "drum_tom_lo_soft": "soft low tom drum",
    "drum_tom_mid_hard": "hard middle tom drum",
    "drum_tom_mid_soft": "soft middle tom drum",
    "elec_beep": "electronic beep",
    "elec_bell": "electronic bell",
    "elec_bong": "electronic bong",
    "elec_chime": "electronic chime",
    "elec_cymbal": "electronic cymbal",
    "elec_ping": "electronic ping",
    "elec_pop": "electronic pop",
    "elec_snare": "electronic snare drum",
    "elec_triangle": "triangle",
    "elec_wood": "wood block",
    "guit_harmonics": "guitar harmonics",
    "guit_e_slide": "guitar slide",
    "loop_tabla": "tabla loop",
    "misc_burp": "burp",
    "misc_cineboom": "cinematic boom",
    "misc_crow": "crow",
    "perc_bell": "bell",
    "perc_door": "closing door",
    "perc_snap": "finger snap",
    "perc_swoosh": "quick swoosh",
    "perc_till": "cash till",
    "vinyl_backspin": "vinyl record backspin",
    "vinyl_hiss": "vinyl record hiss",
    "vinyl_rewind": "vinyl record rewinding",
    "vinyl_scratch": "vinyl record scratch",
}
"""Files whose name says more than its family."""

SPEEDS = (Fraction(1), Fraction(8, 9), Fraction(9, 8), Fraction(4, 5), Fraction(5, 4))
"""Playing speeds: pitch and tempo move together, by up to four semitones."""


@dataclass(frozen=True)
class Effect:
    """One file: samples [n] mono, their rate, captions, and the plain name as label."""

    samples: NDArray[np.float32]
    rate: int
    captions: tuple[str, ...]
    label: str


def effects(archive: Path) -> Iterator[Effect]:
    """Every file that has a caption, in the archive's order."""
    for path, content in members(archive, r"samples/[a-z0-9_]+\.flac$"):
        name = Path(path).stem
        if (label := caption(name)) is None:
            continue
        try:
            samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ConfigError(f"{archive}: {path} cannot be read ({error}): delete it and run again") from error
        yield Effect(samples.mean(1), rate, (article(label), label, f"the sound of {article(label)}"), label)


def caption(name: str) -> str | None:
    """What the file of this name is, in words, or None when its name says nothing."""
    stem = re.sub(r"_?\d+$", "", name) if name not in NAMED else name
    if stem in NAMED:
        return NAMED[stem]
    return next((words for family, words in FAMILIES.items() if stem.startswith(family)), None)
