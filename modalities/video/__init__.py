"""Text to video: short loops with opacity, a diffusers spatio-temporal transformer, MiniLM conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.files.untrusted import Items, Kind, Number, OneOf, Section, Whole
from suite.modality import Modality
from suite.request import RequestOption

if TYPE_CHECKING:  # the file endings are checked before torch is loaded
    import torch
    from torch import Tensor, nn

    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng
    from suite.host.models import ModelFolder
    from suite.modalities.video.files import Clip
    from suite.modalities.video.reading import Shown
    from suite.request import Request


class Video(Modality):
    """One opened video model. x are coordinates [B, C, T, H, W] of tubes (see `tubes`); artifacts are `files.Clip`."""

    name: ClassVar[str] = "video"
    suffixes: ClassVar[tuple[str, ...]] = (".mp4", ".webp", ".gif", ".frames")
    reads: ClassVar[tuple[str, ...]] = suffixes
    options: ClassVar[tuple[RequestOption, ...]] = (
        RequestOption("frames", int, "Frames of the clip, spread evenly over its loop.", low=1, high=1024),
        RequestOption("rate", float, "Frames a second.", low=0.5, high=120),
        RequestOption("loops", int, "How often an .mp4 shows the loop; the other files repeat it for ever.", 1, 1, 100),
    )
    interface: ClassVar[tuple[str, ...]] = (*Modality.interface, "clip", "codec")
    facts: ClassVar[Mapping[str, Kind]] = MappingProxyType(
        {
            "clip": Items(Whole(1, 4096), 4, 4),
            "codec": Section(
                {
                    "kind": OneOf(("dct-tubes",)),
                    "length": Whole(1, 1024),
                    "gain": Number(1e-3, 1e3),
                    "shared": Number(0, 0.999),
                }
            ),
            "rate": Number(0.5, 120),
        }
    )
    calibration_prompts: ClassVar[tuple[str, ...]] = ("a butterfly", "a person running", "a winking face", "a rocket")
    headline: ClassVar[Mapping[str, int]] = MappingProxyType(
        {"frames_frechet": -1, "changes_frechet": -1, "alignment": 1}
    )

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        from suite.diffusion import noise
        from suite.diffusion.prediction import Prediction
        from suite.modalities.shared.words import text_length
        from suite.modalities.video.network import patch_size
        from suite.network import Layout, Network
        from suite.network.weights import load_network

        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.shape = _whole(folder, "shape", 4)
        self.clip = _whole(folder, "clip", 4)
        codec = folder.fact("codec")
        self.tube, self.gain = int(codec["length"]), float(codec["gain"])
        self.shared = float(codec["shared"])
        if self.shape != (self.clip[0] * self.tube, self.clip[1] // self.tube, *self.clip[2:]) or self.clip[0] != 4:
            raise ConfigError(f"model {folder.name}: shape {self.shape} is not the code of a clip {self.clip}")
        if folder.fact("prediction") != "sample":
            raise ConfigError(f"model {folder.name}: prediction {folder.fact('prediction')!r}; expected sample")
        self.noise = noise.from_config(folder.fact("noise"))
        self.prediction = Prediction.named(folder.fact("prediction"))
        module = load_network(folder.path / str(folder.fact("network")), device, dtype)
        patch = patch_size(module)
        tokens = self.shape[1] * (self.shape[2] // patch) * (self.shape[3] // patch)
        distilled = bool(folder.facts.get("guidance_distilled"))
        self.network = Network(module, Layout(self.shape, tokens), distilled)
        self._length = text_length(folder)

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """Standard normal times sigma(1), [B, C, T, H, W]."""
        return rng.normal(self.shape) * float(self.noise.sigma(1.0))

    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Token states [B, L, 384] and their mask [B, L]; the unconditional branch is the negative prompt's."""
        from suite.modalities.shared.text_encoder import branches

        return branches(request.prompts, request.negative, self._length, self.device, self.dtype)

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Call a Latte transformer."""
        from suite.modalities.video.network import call
        from suite.modalities.video.tubes import apart, together

        # What is predicted is x0, so a linear change of coordinates before and its inverse after leave it exact.
        return apart(call(module, together(x, self.shared), time, cond["states"], cond["mask"]), self.shared)

    def decode(self, x0: Tensor, request: Request) -> list[Clip]:
        """Clips, one a row: colour on white, opacity, and the frames that the request asks for."""
        import torch

        from suite.modalities.video.files import Clip
        from suite.modalities.video.tubes import from_tubes, together

        count = int(request.options.get("frames") or self.clip[1])
        clips = from_tubes(together(x0.float(), self.shared), self.tube, self.gain)
        keep = (torch.arange(count) * self.clip[1] / count).round().long()
        levels = ((clips[:, :, keep].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        rate, loops = request.options.get("rate"), request.options.get("loops")
        if rate is None:  # fewer frames of the same loop: it keeps its length
            rate = float(self.folder.facts.get("rate") or 8) * count / self.clip[1]
        return [
            Clip(row[..., :3].copy(), row[..., 3].copy(), float(rate), int(loops or 1)) for row in levels.cpu().numpy()
        ]

    @classmethod
    def read(cls, path: Path) -> Shown:
        """A clip as a player shows it: colour laid on white, and opacity, full where the file knows none."""
        from suite.modalities.video.reading import shown

        return shown(path)

    def to_x0(self, content: Shown, request: Request) -> Tensor:
        """Coordinates [1, C, T, H, W]: moments spread evenly over the loop, their middle in the model's size."""
        import torch

        from suite.modalities.video.files import fitted
        from suite.modalities.video.tubes import apart, to_tubes

        _, frames, height, width = self.clip
        pictures = torch.from_numpy(fitted(content.evenly(frames), (width, height)))
        clip = pictures.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return apart(to_tubes(clip, self.tube, self.gain), self.shared)

    @classmethod
    def check_suffix(cls, suffix: str) -> None:
        """MP4 needs PyAV with an H.264 encoder, WebP a Pillow that has it."""
        from suite.modalities.video.files import check_suffix

        check_suffix(suffix)

    def save(self, artifact: Clip, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write .mp4, .webp, .gif, or a folder .frames, each with the metadata; see `files`."""
        from suite.modalities.video.files import save

        save(artifact, path, metadata)

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata of a clip that `save` wrote."""
        from suite.modalities.video.files import read_metadata

        return read_metadata(path)

    @classmethod
    def same(cls, first: Path, second: Path) -> bool:
        """Whether two clips hold equal frames; see `files.same`."""
        from suite.modalities.video.files import same

        return same(first, second)

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        from suite.modalities.shared.words import check_words

        check_words(request.prompts)
        asked, most = request.options.get("frames"), _whole(folder, "clip", 4)[1]
        if asked is not None and int(asked) > most:
            raise ConfigError(f"--frames {asked}: the model {folder.name} makes clips of 1 to {most} frames")

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> list[str]:
        from suite.modalities.shared.words import prompt_warnings

        return prompt_warnings(folder, request)

    def metrics(self, artifacts: Sequence[Clip], prompts: Sequence[str]) -> dict[str, float]:
        """Distances of frames and of changes to real clips, amount and steadiness of motion, agreement with prompts."""
        from suite.modalities.video.metrics import evaluate

        return evaluate([clip.colour for clip in artifacts], prompts)


def _whole(folder: ModelFolder, key: str, length: int) -> tuple[int, ...]:
    value = folder.fact(key)
    if not (isinstance(value, list) and len(value) == length and all(isinstance(n, int) and n > 0 for n in value)):
        raise ConfigError(f"model {folder.name}: {key} {value!r} in suite.json; expected {length} whole numbers")
    return tuple(value)
