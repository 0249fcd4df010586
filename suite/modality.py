"""`Modality`: everything about one kind of content that the engine must not know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # `suffixes` and `read_metadata` are asked for before anything heavy is needed
    import torch
    from torch import Tensor, nn

    from suite.denoiser import Cond
    from suite.models import ModelFolder
    from suite.network import Network
    from suite.noise import NoiseSchedule
    from suite.prediction import Prediction
    from suite.recipe import Recipe
    from suite.rng import SampleRng


class Modality(ABC):
    """One opened model of one modality. Constructed with a model folder and a device; loads nothing else.

    Class attributes:
        name: entry-point name.
        default_model: name of a shipped model.
        defaults: what a recipe leaves open.
        suffixes: file endings that `save` writes; the first is the default.
        mask_token: for token models.
    """

    name: ClassVar[str]
    default_model: ClassVar[str]
    defaults: ClassVar[Recipe]
    suffixes: ClassVar[tuple[str, ...]]
    mask_token: int | None = None

    folder: ModelFolder
    network: Network
    noise: NoiseSchedule
    prediction: Prediction

    @abstractmethod
    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        """Load the network. ConfigError if the folder's files do not fit."""

    @abstractmethod
    def prior(self, rng: SampleRng) -> Tensor:
        """x at t = 1: [B, ...] float32, or tokens; one row a stream of `rng`."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative: str = "") -> Mapping[str, Cond]:
        """Conditioning of the branches `cond` and `uncond`, one row a prompt."""

    @abstractmethod
    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Call the network: the adapter between the engine's arguments and the module's."""

    @abstractmethod
    def decode(self, x0: Tensor) -> list[Any]:
        """x0 [B, ...] -> one artifact a row (picture, clip, text, waveform, mesh)."""

    @abstractmethod
    def save(self, artifact: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one artifact with its metadata to exactly `path`; the engine renames it into place."""

    @classmethod
    @abstractmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata that `save` wrote. ConfigError if there is none."""

    @classmethod
    def same(cls, first: Path, second: Path) -> bool:
        """Whether two files that `save` wrote with equal metadata hold the same content, bit for bit.

        Compares bytes, which is right as long as `save` is a function of its arguments; a modality whose
        encoder differs between versions of a library decodes and compares instead.
        """
        return first.read_bytes() == second.read_bytes()

    def metrics(self, artifacts: Sequence[Any], prompts: Sequence[str]) -> dict[str, float]:
        """Quality numbers of finished artifacts."""
        raise NotImplementedError(f"the modality {self.name} has no metrics")
