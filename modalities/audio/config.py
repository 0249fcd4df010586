"""What a training file says about an audio model, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.files.inputs import read_yaml
from suite.modalities.audio.fold import folded_shape
from suite.training.config import read_training
from suite.training.loop import TrainOptions


@dataclass(frozen=True)
class AudioTraining:
    """One training recipe of the generator.

    `model` gives the arguments of diffusers' PixArtTransformer2DModel. `fold` is the patch of (mel bands, frames)
    that becomes one position. Times are sigmoid(N(`time_mean`, `time_std`)), or those of the schedule plugin
    `times`; the loss weight is 1 / max(t, `time_floor`)^2. `shares` are shares of the draws by group of clips.
    `sheet` lists captions of the data to draw; `defaults` is what the model proposes to the engine; `vocoder` is
    the folder of a trained vocoder that goes into the model.
    """

    name: str
    model: Mapping[str, Any]
    fold: tuple[int, int] = (80, 2)
    batch: int = 64
    text_length: int = 20
    caption_dropout: float = 0.1
    time_mean: float = 0.6
    time_std: float = 1.0
    time_floor: float = 0.1
    times: str = ""
    shares: Mapping[str, float] = field(default_factory=lambda: {"music": 1.0})
    sheet: tuple[str, ...] = ()
    vocoder: str = ""
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"guidance": 3.0})
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fold", tuple(self.fold))
        object.__setattr__(self, "sheet", tuple(self.sheet))
        folded_shape(self.fold)
        if self.batch < 1 or not 0 <= self.caption_dropout < 1 or self.time_floor <= 0:
            raise ConfigError("batch must be 1 or more, caption_dropout in [0, 1), and time_floor above 0")
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ConfigError(f"shares is {dict(self.shares)}, expected such as {{music: 0.6, words: 0.4}}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[channels, rows, columns] of x."""
        return folded_shape(self.fold)


def read(path: Path | str, overrides: Sequence[str] = ()) -> AudioTraining:
    """The recipe in a YAML file, with `overrides` such as `train.lr=1e-3` laid over it; see `read_training`."""
    return read_training(AudioTraining, path, overrides)


def kind_of(path: Path | str) -> str:
    """The value of the key `kind` of a YAML file; empty without one, or when the file is not readable."""
    path = Path(path)
    try:
        tree = read_yaml(path, "training file")
    except ConfigError:
        return ""
    return str(tree.get("kind", "")) if isinstance(tree, dict) else ""
