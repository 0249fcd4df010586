"""Quality of sounds: distance from real clips, agreement of instruments with the prompt, errors of spoken words.

Needs the extras `audio` and `metrics`. `weights/README.md` is the card of what ships.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suite.errors import ConfigError
from suite.modalities.audio.files import Sound, as_tensor
from suite.modalities.audio.metrics import embedding, musicnn
from suite.modalities.audio.metrics.reference import load_reference
from suite.modalities.audio.metrics.tags import agreement, expected
from suite.modalities.audio.metrics.transcript import transcribe, wanted, word_errors

LEAST = 4
"""Sounds below which a distance between sets means nothing."""


def evaluate(sounds: Sequence[Sound], prompts: Sequence[str]) -> dict[str, float]:
    """All audio metrics of `sounds` made from `prompts`, four or more of them.

    Returns:
        fad_music, fad_speech: Fréchet distance to real clips on musicnn's and on the speech embedding's features;
            lower is better; biased upwards for small N, compare equal N.
        tags: share of the prompts with a known instrument whose sound has one of its tags among musicnn's best 5.
        wer: word errors by Whisper tiny.en for each prompt that asks for a word; `words` is how many do.
        n: number of sounds.
        `tags` and `wer` are absent when no prompt asks for what they measure.
    """
    if len(sounds) != len(prompts):
        raise ConfigError(f"Got {len(sounds)} sounds and {len(prompts)} prompts, expected one prompt a sound")
    if len(sounds) < LEAST:
        raise ConfigError(f"Got {len(sounds)} sounds, expected {LEAST} or more: distances compare sets")
    waves = as_tensor(sounds)
    reference = load_reference()
    music, tags = musicnn.features(waves)
    result = {
        "fad_music": reference.music(music),
        "fad_speech": reference.speech(embedding.features(waves)),
        "n": float(len(sounds)),
    }
    playing = [k for k, prompt in enumerate(prompts) if expected(prompt)]
    if playing:
        result["tags"] = agreement(tags[playing], [prompts[k] for k in playing])
    asked = [(k, word) for k, prompt in enumerate(prompts) if (word := wanted(prompt))]
    if asked:
        heard = transcribe([sounds[k].samples for k, _ in asked])
        errors = [word_errors(text, word) for text, (_, word) in zip(heard, asked, strict=True)]
        result |= {"wer": float(np.mean(errors)), "words": float(len(asked))}
    return result
