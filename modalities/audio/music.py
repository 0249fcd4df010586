"""Short phrases for General MIDI instruments, each with captions that say exactly what is played."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from suite.modalities.audio.midi import DRUMS, Note, Phrase

SECONDS = 2.048
"""Length of a phrase."""


@dataclass(frozen=True)
class Instrument:
    """A General MIDI program, with the keys between which it sounds like itself."""

    name: str
    program: int
    low: int
    high: int


INSTRUMENTS = tuple(
    Instrument(*entry)
    for entry in (
        ("piano", 0, 48, 84),
        ("electric piano", 4, 48, 79),
        ("harpsichord", 6, 48, 79),
        ("music box", 10, 72, 96),
        ("vibraphone", 11, 55, 84),
        ("marimba", 12, 48, 79),
        ("church organ", 19, 48, 79),
        ("accordion", 21, 55, 82),
        ("harmonica", 22, 60, 84),
        ("acoustic guitar", 24, 45, 72),
        ("electric guitar", 27, 45, 72),
        ("distorted guitar", 30, 40, 67),
        ("bass guitar", 33, 28, 50),
        ("violin", 40, 57, 86),
        ("cello", 42, 38, 64),
        ("plucked strings", 45, 48, 79),
        ("harp", 46, 48, 84),
        ("string ensemble", 48, 48, 79),
        ("choir", 52, 48, 74),
        ("trumpet", 56, 57, 80),
        ("trombone", 57, 41, 65),
        ("french horn", 60, 45, 70),
        ("brass section", 61, 48, 74),
        ("saxophone", 65, 52, 77),
        ("oboe", 68, 60, 84),
        ("clarinet", 71, 53, 82),
        ("flute", 73, 62, 90),
        ("pan flute", 75, 62, 86),
        ("synthesizer", 81, 50, 79),
        ("sitar", 104, 48, 74),
        ("banjo", 105, 50, 76),
        ("steel drums", 114, 55, 82),
    )
)

TEMPOS = {"slow": (64, 84), "": (100, 124), "fast": (156, 200)}
"""Beats a minute; no word means an ordinary tempo."""

SCALES = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 10)}
"""Semitones above the tonic: major, and natural minor."""

MODES = {"happy": "major", "sad": "minor"}

KINDS = (
    "melody",
    "melody",
    "melody",
    "chords",
    "arpeggio",
    "bass line",
    "rising scale",
    "falling scale",
    "note",
    "beat",
)
"""What is played; a melody three times as often as the others. `beat` is a melody with drums."""

KICK, SNARE, CLOSED, OPEN, RIDE, CLAP, TOM = 36, 38, 42, 46, 51, 39, 45

BEATS = {
    "rock": ((KICK, (0, 4)), (SNARE, (2, 6)), (CLOSED, tuple(range(8)))),
    "disco": ((KICK, (0, 2, 4, 6)), (SNARE, (2, 6)), (OPEN, (1, 3, 5, 7))),
    "hip hop": ((KICK, (0, 3, 5)), (CLAP, (2, 6)), (CLOSED, tuple(range(8)))),
    "swing": ((RIDE, (0, 2, 3, 4, 6, 7)), (KICK, (0, 4)), (CLOSED, (2, 6))),
    "waltz": ((KICK, (0, 6)), (SNARE, (2, 4, 8, 10)), (CLOSED, (2, 4, 8, 10))),
    "march": ((SNARE, (0, 2, 3, 4, 6, 7)), (KICK, (0, 4))),
    "tribal": ((TOM, (0, 3, 6)), (41, (1, 4, 7)), (KICK, (0, 4))),
}
"""Drum patterns: key and the eighths of a bar at which it is struck."""

KITS = {"": 0, "electronic": 24, "brushed": 40}
"""Drum kits of the sound font, and the word for them."""


@dataclass(frozen=True)
class Piece:
    """A phrase, its captions (most exact first), and the instrument's name or `drums`."""

    phrase: Phrase
    captions: tuple[str, ...]
    label: str


def pieces(each: int, beats: int, seed: int = 0) -> Iterator[Piece]:
    """`each` phrases for every instrument, then `beats` drum patterns; the same seed gives the same pieces."""
    for instrument in INSTRUMENTS:
        for k in range(each):
            yield play(instrument, random.Random(f"{seed}/{instrument.name}/{k}"))
    for k in range(beats):
        yield drum(random.Random(f"{seed}/beat/{k}"))


def article(words: str) -> str:
    """These words with `a` or `an` before them; plurals stay bare."""
    if words.endswith(("strings", "steel drums", "harmonics")):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def play(instrument: Instrument, rng: random.Random) -> Piece:
    """A phrase for one instrument."""
    tempo, kind = rng.choice(list(TEMPOS)), rng.choice(KINDS)
    if kind == "bass line" and instrument.low > 50:
        kind = "melody"
    mood = rng.choice(list(SCALES))
    beat = 60 / rng.uniform(*TEMPOS[tempo])
    programs = [(0, instrument.program)]
    if kind == "note":
        notes, words = _note(instrument, rng)
        phrase = Phrase(tuple(notes), tuple(programs))
        return Piece(phrase, _captions(words, instrument.name), instrument.name)
    tonic = rng.randint(instrument.low, max(instrument.low, instrument.high - 14))
    steps = [tonic + 12 * octave + s for octave in (0, 1) for s in SCALES[mood]] + [tonic + 24]
    steps = [key for key in steps if key <= instrument.high + 2]
    if kind in ("rising scale", "falling scale"):
        notes = _scale(steps, beat / 2, kind == "falling scale")
    elif kind == "chords":
        notes = _chords(steps, beat * (1 if tempo == "slow" else 2), rng)
    elif kind == "arpeggio":
        notes = _arpeggio(steps, beat / 2, rng)
    elif kind == "bass line":
        notes = _bass([max(28, key - 12) if key > 52 else key for key in steps[:8]], beat, rng)
    else:
        notes = _melody(steps, beat, rng)
    what = {"beat": "melody", "chords": "chord progression"}.get(kind, kind)
    words = " ".join(w for w in (tempo, mood, what) if w)
    tail = " with drums" if kind == "beat" else ""
    if kind == "beat":
        programs.append((DRUMS, 0))
        notes = [*notes, *_pattern(BEATS["rock"], beat, rng, 80)]
    captions = _captions(words, instrument.name, tail)
    mode = " ".join(w for w in (tempo, what, "in", MODES[mood]) if w)
    return Piece(
        Phrase(tuple(_cut(notes)), tuple(programs)),
        (*captions[:2], rng.choice((captions[2], f"{instrument.name}, {mode}{tail}"))),
        instrument.name,
    )


def drum(rng: random.Random) -> Piece:
    """A pattern of the drum kit alone."""
    tempo, style, kit = rng.choice(list(TEMPOS)), rng.choice(list(BEATS)), rng.choice(list(KITS))
    beat = 60 / rng.uniform(*TEMPOS[tempo])
    notes = _pattern(BEATS[style], beat, rng, 104, bar=12 if style == "waltz" else 8)
    words = " ".join(w for w in (tempo, kit, style) if w)
    captions = (f"{article(words)} drum beat", f"{article(style)} drum beat", f"drums, {words} beat")
    return Piece(Phrase(tuple(_cut(notes)), ((DRUMS, KITS[kit]),)), captions, "drums")


def _captions(words: str, instrument: str, tail: str = "") -> tuple[str, ...]:
    return f"{article(words)} on {article(instrument)}{tail}", article(instrument), f"{instrument}, {words}{tail}"


def _cut(notes: Sequence[Note]) -> list[Note]:
    """Notes that begin inside the phrase, none longer than it."""
    inside = [n for n in notes if n.start < SECONDS - 0.06]
    return [Note(n.start, min(n.length, SECONDS - n.start), n.key, n.velocity, n.channel) for n in inside]


def _note(instrument: Instrument, rng: random.Random) -> tuple[list[Note], str]:
    middle = (instrument.low + instrument.high) // 2
    word = rng.choice(("low", "high"))
    key = rng.randint(instrument.low, middle - 3) if word == "low" else rng.randint(middle + 3, instrument.high)
    return [Note(0.05, 1.7, key, 100)], f"single {word} note"


def _melody(keys: Sequence[int], beat: float, rng: random.Random) -> list[Note]:
    place, now, notes = rng.choice((0, 2, 4)), 0.0, []
    while now < SECONDS:
        length = beat * rng.choice((0.5, 0.5, 1.0, 1.0, 1.5))
        notes.append(Note(now, length * 0.95, keys[place], rng.randint(88, 110)))
        now += length
        place = min(max(place + rng.choice((-2, -1, -1, 1, 1, 2, 3)), 0), len(keys) - 1)
    return notes


def _scale(keys: Sequence[int], step: float, falling: bool) -> list[Note]:
    order = list(reversed(keys[:8])) if falling else list(keys[:8])
    return [Note(k * step, step * (0.95 if k < 7 else 2), key, 96) for k, key in enumerate(order)]


def _chords(keys: Sequence[int], length: float, rng: random.Random) -> list[Note]:
    roots = rng.choice(((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 0, 4)))
    count = int(SECONDS / length) + 1
    return [
        Note(k * length, length * 0.95, keys[(roots[k % 4] + third) % len(keys)], 92)
        for k in range(count)
        for third in (0, 2, 4)
    ]


def _arpeggio(keys: Sequence[int], step: float, rng: random.Random) -> list[Note]:
    shape = rng.choice(((0, 2, 4, 7), (0, 2, 4, 2), (7, 4, 2, 0), (0, 4, 2, 4)))
    roots = rng.choice(((0, 3), (0, 4), (0, 0)))
    count = int(SECONDS / step) + 1
    tones = [min(shape[k % 4] + roots[(k // 4) % 2], len(keys) - 1) for k in range(count)]
    return [Note(k * step, step * 1.2, keys[tone], 96) for k, tone in enumerate(tones)]


def _bass(keys: Sequence[int], beat: float, rng: random.Random) -> list[Note]:
    shape = rng.choice(((0, 0, 4, 0), (0, 2, 4, 5), (0, 4, 0, 4), (0, 0, 3, 4)))
    step = beat / 2
    count = int(SECONDS / step) + 1
    return [Note(k * step, step * 0.9, keys[min(shape[k % 4], len(keys) - 1)], 104) for k in range(count)]


def _pattern(
    lines: Sequence[tuple[int, Sequence[int]]], beat: float, rng: random.Random, velocity: int, bar: int = 8
) -> list[Note]:
    step = beat / 2
    bars = int(SECONDS / (bar * step)) + 1
    return [
        Note(
            (b * bar + eighth) * step,
            0.2,
            key,
            min(127, velocity - (24 if key in (CLOSED, RIDE) else 0) + rng.randint(-6, 6)),
            DRUMS,
        )
        for b in range(bars)
        for key, eighths in lines
        for eighth in eighths
    ]
