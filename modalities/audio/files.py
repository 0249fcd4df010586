"""Sound files: WAV, FLAC and MP3, with the metadata of the suite as their comment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from suite.errors import ConfigError
from suite.modalities.audio.riff import add_comment, read_comment

if TYPE_CHECKING:  # writing a file needs no torch
    from torch import Tensor

try:
    import soundfile
except (ImportError, OSError) as missing:  # OSError: the package is here, the library that it loads is not
    raise ConfigError(
        f"Sound files need soundfile, which cannot be loaded ({missing}). "
        "Type: pip install 'efficient-diffusion-suite[audio]'"
    ) from missing

SUFFIXES = (".wav", ".flac", ".mp3")
SLOWEST = 100
"""Samples a second that a sound has at least."""
MOST_PHASES = 640
"""Of the filter that changes rates; 640 makes 16 kHz of 11.025 kHz and of each multiple of it exactly."""


@dataclass(frozen=True, eq=False)
class Sound:
    """Mono sound: `samples` float32 [n] in [-1, 1], `rate` a second."""

    samples: NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / self.rate


def check_encoder(suffix: str) -> None:
    """Raise ConfigError unless libsndfile writes files of this ending."""
    if suffix[1:].upper() not in soundfile.available_formats():
        can = [s for s in SUFFIXES if s[1:].upper() in soundfile.available_formats()]
        raise ConfigError(
            f"libsndfile {soundfile.__libsndfile_version__} has no encoder for {suffix}; "
            f"choose {', '.join(can)}, or pip install -U soundfile"
        )


def write(sound: Sound, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `sound` in the format that the ending names: 16 bit, or MP3 at libsndfile's own quality.

    Raises ConfigError when libsndfile has no encoder for it.
    """
    suffix, text = path.suffix.lower(), json.dumps(metadata)
    check_encoder(suffix)
    subtype = None if suffix == ".mp3" else "PCM_16"
    with soundfile.SoundFile(path, "w", sound.rate, 1, subtype) as stream:
        if suffix != ".wav":
            stream.comment = text
        stream.write(np.clip(sound.samples, -1, 1))
    if suffix == ".wav":
        add_comment(path, text)


def read(path: Path, seconds: float | None = None) -> Sound:
    """A sound file, or its first `seconds`, as mono: the mean of all channels, integers of any width over full scale.

    Raises:
        ConfigError: it cannot be read, or has samples that are no numbers.
    """
    try:
        with soundfile.SoundFile(path) as stream:
            rate = stream.samplerate
            count = -1 if seconds is None else math.ceil(seconds * rate)
            samples = stream.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ConfigError(f"{path} is not a readable sound file: {error}") from error
    if not (finite := np.isfinite(samples)).all():
        count, first = int((~finite).sum()), int((~finite).any(1).argmax())
        raise ConfigError(f"{path} has {count} samples that are no numbers, the first at {first / rate:g} s")
    return Sound(samples.mean(1), rate)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata that `write` wrote. Raises ConfigError if there is none."""
    try:
        with soundfile.SoundFile(path) as stream:
            text = stream.comment or ""
    except (soundfile.LibsndfileError, OSError) as error:
        raise ConfigError(f"{path} is not a readable sound file: {error}") from error
    if path.suffix.lower() == ".wav":
        text = read_comment(path) or ""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} was not made by this suite: its comment holds no report")
    return found


def at_rate(sound: Sound, rate: int) -> Sound:
    """The same sound with `rate` samples a second."""
    if sound.rate == rate:
        return sound
    import torch
    from torchaudio.functional import resample

    if sound.rate < SLOWEST:
        raise ConfigError(f"a sound of {sound.rate} samples a second holds nothing to hear; expected {SLOWEST} or more")
    # A filter has as many phases as the denominator: odd rates go to a ratio that is off by 1 in 5,000 at most.
    ratio = Fraction(sound.rate, rate).limit_denominator(MOST_PHASES)
    samples = torch.from_numpy(np.ascontiguousarray(sound.samples))
    return Sound(resample(samples, ratio.numerator, ratio.denominator).numpy(), rate)


def as_tensor(sounds: Sequence[Sound]) -> Tensor:
    """float32 [N, 32768]: sounds at 16 kHz, cut or padded with silence to 2.048 s."""
    import torch

    from suite.modalities.audio.mel import RATE, SAMPLES

    rows = torch.zeros(len(sounds), SAMPLES)
    for row, sound in zip(rows, sounds, strict=True):
        if sound.rate != RATE:
            raise ConfigError(f"A sound has {sound.rate} samples a second, expected {RATE}: resample it")
        part = sound.samples[:SAMPLES]
        row[: len(part)] = torch.from_numpy(np.ascontiguousarray(part))
    return rows
