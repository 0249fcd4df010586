"""What a training file says about a text model, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from suite.errors import ConfigError
from suite.training.config import read_training
from suite.training.loop import TrainOptions


@dataclass(frozen=True)
class TextTraining:
    """One training recipe.

    `family` chooses the diffusion: masked tokens, or continuous embeddings of `width` channels. `model` gives the
    arguments of transformers' ModernBertConfig, or with `start: minilm` what differs from the sentence encoder's.
    `canvases` are the lengths of text that are trained, with the batch of each, and `canvas_shares` how often each is
    drawn; `shares` how often each kind of text is, for all canvases or in `shares_at` for one. `pad_weight` is the
    weight of the places after a text's end. `time_floor` is the smallest time drawn.
    Masked only: `weighting` is `bound`, each masked place by 1/t, or `mean`, all masked places alike.
    Continuous only: `self_conditioning` is how often the network is shown its own estimate, `noise` the schedule's
    description, `anchor` the weight of the squared error beside the cross-entropy.
    """

    name: str
    family: Literal["masked", "continuous"]
    model: Mapping[str, Any]
    canvases: Mapping[int, int]
    canvas_shares: Mapping[int, float]
    noise: Mapping[str, Any]
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"definition": 0.6, "sentence": 0.1, "novel": 0.1, "speech": 0.2}
    )
    shares_at: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    weighting: Literal["bound", "mean"] = "bound"
    prompt_dropout: float = 0.1
    pad_weight: float = 0.3
    time_floor: float = 0.05
    width: int = 128
    self_conditioning: float = 0.5
    anchor: float = 0.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if self.family not in ("masked", "continuous"):
            raise ConfigError(f"family is {self.family!r}, expected masked or continuous")
        if not self.canvases or set(self.canvases) != set(self.canvas_shares):
            raise ConfigError("canvases and canvas_shares must name the same lengths, such as {32: 64} and {32: 1.0}")
        if any(not 8 <= int(n) <= 64 or b < 1 for n, b in self.canvases.items()):
            raise ConfigError(
                f"canvases is {dict(self.canvases)}, expected lengths of 8 to 64 with batches of 1 or more"
            )
        if self.weighting not in ("bound", "mean"):
            raise ConfigError(f"weighting is {self.weighting!r}, expected bound or mean")
        if unknown := set(self.shares_at) - set(self.canvases):
            raise ConfigError(f"shares_at names {sorted(unknown)}, which are no canvases")
        if self.family == "continuous" and self.model.get("start"):
            raise ConfigError("model.start is for the masked family; the continuous one starts from nothing")
        tables = [("shares", self.shares), ("canvas_shares", self.canvas_shares)]
        for name, table in (*tables, *((f"shares_at.{n}", t) for n, t in self.shares_at.items())):
            if not table or min(table.values()) < 0 or sum(table.values()) <= 0:
                raise ConfigError(f"{name} is {dict(table)}, expected parts of 0 or more")
        if not 0 <= self.prompt_dropout < 1 or not 0 < self.time_floor < 1 or not 0 <= self.self_conditioning <= 1:
            raise ConfigError("prompt_dropout and self_conditioning must be chances, and time_floor inside (0, 1)")


def read(path: Path | str, overrides: Sequence[str] = ()) -> TextTraining:
    """The recipe in a YAML file, with `overrides` such as `train.lr=1e-3` laid over it.

    Raises ConfigError that names the file and the key for anything unknown, missing or of the wrong kind.
    """
    return read_training(TextTraining, path, overrides)
