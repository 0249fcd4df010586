"""`Modality`: everything about one kind of content that the engine must not know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from suite.request import RequestOption

if TYPE_CHECKING:  # `suffixes` and `read_metadata` are asked for before anything heavy is needed
    import torch
    from torch import Tensor, nn

    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.prediction import Prediction
    from suite.diffusion.rng import SampleRng
    from suite.engine.score_distillation import Representation
    from suite.files.untrusted import Kind
    from suite.host.models import ModelFolder
    from suite.network import Network
    from suite.request import Request


class Modality(ABC):
    """One opened model of one modality. Constructed with a model folder and a device; loads nothing else.

    Class attributes:
        name: entry-point name.
        suffixes: file endings that `save` writes; the first is the default.
        joins: those of them whose files may be appended to each other: many results then share one file. What `save`
            writes there holds its own metadata, since nothing is written beside it.
        beside: what may be appended to a file's whole name for what lies beside it (`extras`), such as `.preview.png`.
        options: what a request may choose besides the prompt; the command line makes flags of them.
        reads: endings of files with which sampling can begin (`--init`); empty if there is no such thing.
        printable: without `-o` the result is printed (`show`), not saved.
        driver: how content comes about: `sample` from the prior to x0, or `distill` into a representation.
        interface: facts of suite.json in which two models must agree if one is to take over from the other in the
            middle of a run: what x is, how it is noised, what is predicted, how prompts are told.
        facts: kinds of the facts of suite.json that this modality has of its own (`suite.files.untrusted`).
        vocabulary: a file of the folder that must be the same for that, if tokens are numbered by one.
        borrows: modalities whose models this one can take for its own, e.g. an image model as a teacher.
        borrowed: what a recipe leaves open when the model is borrowed; goes over the model's own defaults.
        calibration_prompts: what is generated when a plugin asks for records of the network's inputs.
        headline: those numbers of `metrics` by which methods are compared: name -> 1 if more is better, -1 if less is.
        mask_token: for token models.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    joins: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[RequestOption, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    printable: ClassVar[bool] = False
    driver: ClassVar[str] = "sample"
    interface: ClassVar[tuple[str, ...]] = ("noise", "prediction", "shape", "text", "guidance_distilled")
    facts: ClassVar[Mapping[str, Kind]] = MappingProxyType({})
    vocabulary: ClassVar[str] = ""
    borrows: ClassVar[tuple[str, ...]] = ()
    borrowed: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    calibration_prompts: ClassVar[tuple[str, ...]] = (
        "a red apple", "a smiling cat", "a blue car", "a house with a garden",
    )  # fmt: skip
    headline: ClassVar[Mapping[str, int]] = MappingProxyType({})
    mask_token: int | None = None

    folder: ModelFolder
    network: Network
    noise: NoiseSchedule
    prediction: Prediction

    @abstractmethod
    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        """Load the network. ConfigError if the folder's files do not fit."""

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        """Refuse what this model cannot do: called before it is loaded, so without torch.

        Raises:
            ConfigError: an option's value is out of this model's range, or a prompt says nothing to it.
        """
        del folder, request

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> Sequence[str]:
        """What this model will not do as asked, though it can be run: a sentence each, for people and the report.

        Called after `check`, so without torch as well.
        """
        del folder, request
        return ()

    @abstractmethod
    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """x at t = 1: [B, ...] float32, or tokens; one row a stream of `rng`."""

    @abstractmethod
    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Conditioning of the branches `cond` and `uncond`, one row a prompt."""

    @abstractmethod
    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Call the network: the adapter between the engine's arguments and the module's."""

    def tokens(self, request: Request) -> int:
        """Positions of one sample that the network attends over, for this request; 0 if that is not known.

        What the network's layout says, unless an option of the request decides.
        """
        del request
        return self.network.layout.tokens if self.network.layout else 0

    def denoiser(self, inner: Denoiser, request: Request) -> Denoiser:
        """What the model itself needs around its network, made afresh for each run.

        For models that are fed their own last estimate (self-conditioning) or whose estimates must be clamped to
        the data. It lies below every plugin and below guidance, so it sees which branches a call carries.
        """
        del request
        return inner

    def representation(self, request: Request, index: int, seed: int) -> Representation:
        """What distillation optimises for sample `index` of the request; for modalities whose driver is `distill`."""
        raise NotImplementedError(f"the modality {self.name} has nothing to distill into")

    @classmethod
    def work(cls, steps: int, options: Mapping[str, Any], batch: int) -> int:
        """How often a batch reports progress; for bars. The recipe's steps, unless the modality knows better."""
        del options, batch
        return steps

    @abstractmethod
    def decode(self, x0: Any, request: Request) -> list[Any]:
        """x0 [B, ...] -> one artifact a row (picture, clip, text, waveform, mesh).

        After distillation x0 is a list of `suite.engine.score_distillation.Distilled`; artifacts may be
        fewer than prompts if the run was stopped.
        """

    def why_empty(self, artifact: Any) -> str:
        """Why there is nothing in an artifact, and what to try: no words, silence, no surface. Empty if there is.

        Such an artifact is not saved: the run goes on with the others and ends with exit code 3.
        """
        del artifact
        return ""

    @abstractmethod
    def save(self, artifact: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one artifact with its metadata to exactly `path`; the engine renames it into place.

        Like `extras`, `show` and `why_empty` it must do without the model: a pickled result leaves that behind.
        """

    @classmethod
    @abstractmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata that `save` wrote. ConfigError if there is none."""

    @classmethod
    def read_whole(cls, path: Path) -> Sequence[Mapping[str, Any]]:
        """The metadata of all results in a file, several where they are joined; the file is read to its end.

        Raises:
            ConfigError: as `read_metadata`, or the file is cut off.
        """
        found = cls.read_metadata(path)
        if path.suffix.lower() in cls.reads:
            cls.read(path)
        return [found]

    @classmethod
    def read(cls, path: Path) -> Any:
        """What is in a file of one of the endings in `reads`, whoever made it; no model is loaded, nor torch.

        Raises:
            ConfigError: the file cannot be read, or holds nothing of this kind.
        """
        raise NotImplementedError(f"the modality {cls.name} reads no files")

    def to_x0(self, content: Any, request: Request) -> Tensor:
        """x0 [1, ...] of what `read` found: the inverse of `decode`, up to what the codec loses.

        Raises:
            ConfigError: it does not fit the model or the request.
        """
        raise NotImplementedError(f"the modality {self.name} cannot begin with a file")

    @classmethod
    def check_suffix(cls, suffix: str) -> None:
        """Refuse an ending of `suffixes` that cannot be written on this machine, before any heavy work.

        Raises:
            ConfigError: an encoder is missing; the message says how to get it.
        """
        del suffix

    @classmethod
    def same(cls, first: Path, second: Path) -> bool:
        """Whether two files that `save` wrote with equal metadata hold the same content, bit for bit.

        Compares bytes, which is right as long as `save` is a function of its arguments; a modality whose
        encoder differs between versions of a library decodes and compares instead.
        """
        return first.read_bytes() == second.read_bytes()

    def extras(self, artifact: Any, metadata: Mapping[str, Any]) -> Mapping[str, Callable[[Path], None]]:
        """Files that belong beside the main one: what is appended to its name -> how to write it; those of `beside`.

        The whole name is kept, so that results of different endings never share one: `a.glb.preview.png`.
        """
        del artifact, metadata
        return {}

    def show(self, artifact: Any) -> str:
        """The artifact as text for a terminal; for modalities that are `printable`."""
        raise NotImplementedError(f"the modality {self.name} does not print its results")

    @classmethod
    def benchmark_prompts(cls) -> tuple[str, ...]:
        """What `suite bench quality` asks for if nobody says; not to be found in the training data, if that can be."""
        return cls.calibration_prompts

    @classmethod
    def ceiling(cls) -> dict[str, float]:
        """The numbers of `metrics` of real content for `benchmark_prompts`; empty where there is none."""
        return {}

    def metrics(self, artifacts: Sequence[Any], prompts: Sequence[str]) -> dict[str, float]:
        """Quality numbers of finished artifacts."""
        raise NotImplementedError(f"the modality {self.name} has no metrics")
