"""Spoken words by the voices of Flite (CMU), whose sound is free to use."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from suite.errors import ConfigError

RATE = 16_000
"""Samples a second of the voices used here."""

DIGITS = tuple("zero one two three four five six seven eight nine ten".split())

WORDS = tuple(
    """eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty
    seventy eighty ninety hundred thousand million first second third half
    yes no hello goodbye please thanks welcome sorry okay maybe stop go start wait open close left right up down
    forward backward on off in out begin end near far before after always never again
    red green blue yellow orange purple black white brown gray pink silver golden
    cat dog bird horse cow pig sheep chicken duck mouse rabbit lion tiger bear wolf fox monkey elephant snake frog fish
    whale shark spider butterfly bee ant turtle camel eagle owl
    apple banana cherry lemon grape strawberry melon tomato potato carrot onion bread butter cheese milk water coffee
    tea sugar salt pepper rice soup cake chocolate honey egg
    house window door kitchen table chair bed lamp mirror garden roof floor wall bridge tower castle church school
    hospital market station airport street city village country
    car bus train boat ship airplane bicycle truck rocket wheel engine
    mountain river ocean forest desert island valley beach lake cave rain snow wind storm thunder lightning cloud sun
    moon star planet fire ice stone sand gold iron
    monday tuesday wednesday thursday friday saturday sunday january february march april june july august september
    october november december morning evening midnight today tomorrow yesterday spring summer autumn winter
    mother father sister brother baby child friend doctor teacher farmer king queen soldier captain pirate wizard robot
    head hand foot finger heart eye ear nose mouth hair
    music song dance guitar piano violin drum trumpet flute picture color story book paper pencil letter number
    computer telephone camera radio television machine battery energy light sound silence
    happy sad angry hungry tired quick slow big small hot cold warm new old young strong beautiful wonderful perfect
    love hope peace dream magic secret danger victory freedom justice memory future history science
    walk run jump swim fly climb sleep eat drink sing laugh cry read write play work think listen remember
    ball bell box bottle basket button candle clock crown diamond feather flag flower glass hammer hat jacket key
    knife ladder map medal needle ring rope shirt shoe sword ticket umbrella wallet""".split()
)


@dataclass(frozen=True)
class Voice:
    """A voice of Flite, and the words for it: `short` after a comma, `speaker` before `says`."""

    flite: str
    short: str
    speaker: str


VOICES = (
    Voice("slt", "female voice", "a woman"),
    Voice("rms", "male voice", "a man"),
    Voice("awb", "scottish voice", "a scottish man"),
    Voice("kal16", "robot voice", "a robot"),
)

STRETCHES = (1.0, 1.2)
"""How long a word is drawn out; each word is spoken once at each."""


@dataclass(frozen=True)
class Spoken:
    """A word to be spoken, its captions (most exact first) and the word itself as the label."""

    word: str
    voice: Voice
    stretch: float

    @property
    def captions(self) -> tuple[str, ...]:
        """Two ways to ask for it."""
        return f"the word {self.word}, {self.voice.short}", f"{self.voice.speaker} says {self.word}"


def spoken() -> Iterator[Spoken]:
    """Every word by every voice at every stretch; digits at two more."""
    for voice in VOICES:
        for word in (*DIGITS, *WORDS):
            for stretch in (*STRETCHES, 0.9, 1.1) if word in DIGITS else STRETCHES:
                yield Spoken(word, voice, stretch)


def speak(item: Spoken) -> NDArray[np.float32]:
    """Samples [n] at 16 kHz. Raises ConfigError when the program flite is missing, fails, or lacks the voice."""
    program = shutil.which("flite")
    if program is None:
        raise ConfigError("Words are spoken by the program flite, which is not installed. Type: apt-get install flite")
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "word.wav"
        options = ["-voice", item.voice.flite, "--setf", f"duration_stretch={item.stretch}", "-t", item.word]
        done = subprocess.run([program, *options, "-o", str(sound)], capture_output=True, text=True, check=False)
        if done.returncode or not sound.is_file():
            raise ConfigError(f"flite failed with status {done.returncode}: {done.stderr.strip()[-200:]}")
        samples, rate = soundfile.read(sound, dtype="float32")
    if rate != RATE:
        raise ConfigError(f"flite's voice {item.voice.flite} gave {rate} Hz, expected {RATE} Hz")
    return trim(np.asarray(samples, np.float32))


def trim(samples: NDArray[np.float32], level: float = 0.01) -> NDArray[np.float32]:
    """Without the quiet ends: from 20 ms before the first sample above `level` of the peak, to 60 ms after the last."""
    loud = np.flatnonzero(np.abs(samples) > level * np.abs(samples).max())
    if not len(loud):
        return samples
    return samples[max(0, loud[0] - RATE // 50) : loud[-1] + RATE * 6 // 100]
