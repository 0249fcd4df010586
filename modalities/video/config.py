"""What a training file says about a video model, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.training.config import read_training
from suite.training.loop import TrainOptions


@dataclass(frozen=True)
class VideoTraining:
    """One training recipe.

    `model` gives the arguments of diffusers' LatteTransformer3DModel. `clip` is [4, frames, size, size] (RGBA); a
    tube takes `tube` frames, `gain` strengthens its motion coefficients, and `shared` is the part of the noise that
    tubes have in common (see `tubes`). `start` names an image model whose weights the spatial half begins with.
    Times are sigmoid(N(`time_mean`, `time_std`)), or those of the schedule plugin `times`; the loss weight is 1 /
    max(t, `time_floor`)^2. `rate` is frames a second. `sheet` lists captions of the data to draw; `defaults` is
    what the model proposes to the engine.
    """

    name: str
    model: Mapping[str, Any]
    clip: tuple[int, int, int, int]
    tube: int = 6
    gain: float = 3.0
    shared: float = 0.0
    start: str = ""
    rate: float = 8.0
    batch: int = 16
    text_length: int = 24
    caption_dropout: float = 0.1
    time_mean: float = 1.0
    time_std: float = 1.0
    time_floor: float = 0.1
    times: str = ""
    sheet: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"guidance": 3.0})
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", tuple(self.clip))
        object.__setattr__(self, "sheet", tuple(self.sheet))
        if len(self.clip) != 4 or self.clip[0] != 4 or self.clip[2] != self.clip[3]:
            raise ConfigError(f"clip is {list(self.clip)}, expected [4, frames, size, size]")
        if self.tube < 1 or self.clip[1] % self.tube:
            raise ConfigError(f"tube is {self.tube}, expected a divisor of the clip's {self.clip[1]} frames")
        if not 0 <= self.shared < 1:
            raise ConfigError(f"shared is {self.shared}, expected a part of the noise in [0, 1)")
        if self.batch < 1 or not 0 <= self.caption_dropout < 1 or self.time_floor <= 0 or self.gain <= 0:
            raise ConfigError("batch must be 1 or more, caption_dropout in [0, 1), time_floor and gain above 0")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a code: [channels, tubes, size, size]."""
        channels, frames, height, width = self.clip
        return channels * self.tube, frames // self.tube, height, width


def read(path: Path | str, overrides: Sequence[str] = ()) -> VideoTraining:
    """The recipe in a YAML file; see `read_training`."""
    return read_training(VideoTraining, path, overrides)
