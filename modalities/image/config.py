"""What a training file says about an image model, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from suite.errors import ConfigError
from suite.training.config import read_training
from suite.training.loop import TrainOptions


@dataclass(frozen=True)
class ImageTraining:
    """One training recipe.

    `network` chooses the class and `model` gives its arguments as diffusers names them. Times are
    sigmoid(N(`time_mean`, `time_std`)), or those of the schedule plugin `times`; the loss weight is 1 / max(t,
    `time_floor`)^2. `styles` are shares of the draws. `immiscible` pairs noise with pictures inside a batch.
    `sheet` lists captions of the data to draw; `defaults` is what the model proposes to the engine.
    """

    name: str
    network: Literal["transformer", "unet"]
    model: Mapping[str, Any]
    shape: tuple[int, int, int]
    batch: int = 64
    text_length: int = 24
    caption_dropout: float = 0.1
    time_mean: float = 0.6
    time_std: float = 1.0
    time_floor: float = 0.1
    times: str = ""
    immiscible: bool = False
    styles: Mapping[str, float] = field(default_factory=lambda: {"3d": 1.0})
    sheet: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"guidance": 3.0})
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "sheet", tuple(self.sheet))
        if self.network not in ("transformer", "unet"):
            raise ConfigError(f"network is {self.network!r}, expected transformer or unet")
        if len(self.shape) != 3 or self.shape[0] != 3 or self.shape[1] != self.shape[2]:
            raise ConfigError(f"shape is {list(self.shape)}, expected [3, size, size]")
        if self.batch < 1 or not 0 <= self.caption_dropout < 1 or self.time_floor <= 0:
            raise ConfigError("batch must be 1 or more, caption_dropout in [0, 1), and time_floor above 0")
        if not self.styles or min(self.styles.values()) < 0 or sum(self.styles.values()) <= 0:
            raise ConfigError(f"styles is {dict(self.styles)}, expected shares such as {{3d: 0.9, flat: 0.1}}")


def read(path: Path | str, overrides: Sequence[str] = ()) -> ImageTraining:
    """The recipe in a YAML file; see `read_training`."""
    return read_training(ImageTraining, path, overrides)
