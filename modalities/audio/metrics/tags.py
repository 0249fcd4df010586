"""Whether an instrument that a prompt names is heard: musicnn's tags against the words of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from suite.modalities.audio.metrics.musicnn import TAGS

BEST = 5
"""Tags of a sound that count as heard."""

INSTRUMENTS = {
    "acoustic guitar": ("guitar",),
    "banjo": ("guitar", "country"),
    "cello": ("cello", "strings"),
    "choir": ("choir", "choral", "vocal", "vocals", "voice", "singing"),
    "distorted guitar": ("guitar", "rock", "metal"),
    "drum": ("drums", "beat", "beats"),
    "electric guitar": ("guitar", "rock"),
    "electric piano": ("piano",),
    "flute": ("flute",),
    "harp": ("harp",),
    "harpsichord": ("harpsichord",),
    "piano": ("piano",),
    "sitar": ("sitar", "indian"),
    "string ensemble": ("strings", "violin", "cello"),
    "synthesizer": ("synth", "electronic", "techno"),
    "violin": ("violin", "strings"),
}
"""Instruments of the training set that the tagger knows, and the tags that say so."""


def expected(prompt: str) -> tuple[str, ...]:
    """The tags that would agree with a prompt; empty when it names no instrument that the tagger knows."""
    text = f" {prompt.lower().replace(',', ' ').split(' with drums')[0]} "
    found = [name for name in INSTRUMENTS if f" {name} " in text]
    return INSTRUMENTS[max(found, key=len)] if found else ()


def agreement(probabilities: Tensor, prompts: Sequence[str]) -> float:
    """Share of the rows [N, 50] that have an expected tag among the `BEST` most probable."""
    best = probabilities.topk(BEST, dim=1).indices.tolist()
    hits = [bool({TAGS[k] for k in row} & set(expected(p))) for row, p in zip(best, prompts, strict=True)]
    return sum(hits) / len(hits)
