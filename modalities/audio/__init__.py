"""Text to sound: log-mel pictures by a diffusers transformer, MiniLM conditioning, a small vocoder; 16 kHz, 2 s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.files.untrusted import Items, Kind, Whole
from suite.modality import Modality
from suite.request import RequestOption

if TYPE_CHECKING:  # the file endings are checked before torch is loaded
    import torch
    from torch import Tensor, nn

    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng
    from suite.host.models import ModelFolder
    from suite.modalities.audio.files import Sound
    from suite.request import Request

NETWORK = "transformer"
VOCODER = "vocoder"
LISTENED = 3.0
"""Seconds that are read of a file to begin with: all that the models make, and what a filter looks ahead."""
SILENCE = 1e-3
"""Peak below which a sound is silence: -60 dB of full scale."""


class Audio(Modality):
    """One opened audio model. x is [B, C, H, W], a folded picture of sound in [-1, 1]; artifacts are `Sound`s."""

    name: ClassVar[str] = "audio"
    suffixes: ClassVar[tuple[str, ...]] = (".wav", ".flac", ".mp3")
    reads: ClassVar[tuple[str, ...]] = (".wav", ".flac", ".mp3", ".ogg")
    options: ClassVar[tuple[RequestOption, ...]] = (
        RequestOption("seconds", float, "Length; what the model makes beyond it is cut.", None, 0.25, 2.048),
    )
    interface: ClassVar[tuple[str, ...]] = (*Modality.interface, "fold")
    facts: ClassVar[Mapping[str, Kind]] = MappingProxyType({"fold": Items(Whole(1, 1024), 2, 2)})
    calibration_prompts: ClassVar[tuple[str, ...]] = (
        "a slow melody on a violin", "a fast rock drum beat", "the word seven, female voice", "a cowbell",
    )  # fmt: skip
    headline: ClassVar[Mapping[str, int]] = MappingProxyType({"fad_music": -1, "fad_speech": -1, "tags": 1})

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        from suite.diffusion import noise
        from suite.diffusion.prediction import Prediction
        from suite.modalities.audio.fold import folded_shape
        from suite.modalities.audio.vocoder import open_vocoder
        from suite.modalities.shared.words import text_length
        from suite.network import Layout, Network
        from suite.network.weights import load_network

        self.folder = folder
        self.device = device
        self.dtype = dtype
        bands, frames = folder.fact("fold")
        self.fold: tuple[int, int] = (bands, frames)
        self.shape = folded_shape(self.fold)
        self.noise = noise.from_config(folder.fact("noise"))
        self.prediction = Prediction.named(folder.fact("prediction"))
        module = load_network(folder.path / NETWORK, device, dtype)
        self.network = Network(module, Layout(self.shape, tokens=self.shape[1] * self.shape[2]))
        self.vocoder = open_vocoder(folder.path / VOCODER, device)
        self._length = text_length(folder)

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """Standard normal times sigma(1), [B, C, H, W]."""
        return rng.normal(self.shape) * float(self.noise.sigma(1.0))

    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Token states [B, L, 384] and their mask [B, L]; the unconditional branch is the negative prompt's."""
        from suite.modalities.shared.text_encoder import branches

        return branches(request.prompts, request.negative, self._length, self.device, self.dtype)

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Call the PixArt transformer with token states and a mask."""
        from suite.modalities.shared.pixart import call_pixart

        return call_pixart(module, x, time, cond)

    def decode(self, x0: Tensor, request: Request) -> list[Sound]:
        """Sounds, one a row, cut to the seconds asked for with a short fade."""
        import torch

        from suite.modalities.audio.files import Sound
        from suite.modalities.audio.fold import unfold
        from suite.modalities.audio.mel import RATE, SAMPLES, faded

        seconds = request.options.get("seconds")
        length = SAMPLES if seconds is None else min(SAMPLES, round(float(seconds) * RATE))
        # One by one, so that a sound does not depend on the others of its batch.
        pictures = unfold(x0.float().clamp(-1, 1), self.fold).split(1)
        with torch.inference_mode():
            sounds = [faded(self.vocoder.sound(picture)[:, :length])[0] for picture in pictures]
        return [Sound(sound.cpu().numpy(), RATE) for sound in sounds]

    def why_empty(self, artifact: Sound) -> str:
        """Silence: nothing above -60 dB of full scale."""
        if len(artifact.samples) and float(abs(artifact.samples).max()) >= SILENCE:
            return ""
        return "the sound is silence. Try another --seed, more --steps, or a plainer prompt"

    def save(self, artifact: Sound, path: Path, metadata: Mapping[str, Any]) -> None:
        """A sound file in the format that the ending names; its comment holds the metadata as JSON."""
        from suite.modalities.audio.files import write

        write(artifact, path, metadata)

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata of a sound file that `save` wrote."""
        from suite.modalities.audio.files import read_metadata

        return read_metadata(path)

    @classmethod
    def read(cls, path: Path) -> Sound:
        """The beginning of a sound file as mono, clipped at full scale as a player does."""
        import numpy as np

        from suite.modalities.audio.files import Sound, read

        sound = read(path, LISTENED)
        if not len(sound.samples):
            raise ConfigError(f"{path} holds no sound: it has 0 samples")
        return Sound(np.clip(sound.samples, -1, 1), sound.rate)

    def to_x0(self, content: Sound, request: Request) -> Tensor:
        """[1, C, H, W]: the first 2.048 s at 16 kHz, silence after a shorter sound, as a folded log-mel picture."""
        from suite.modalities.audio.files import as_tensor, at_rate
        from suite.modalities.audio.fold import fold
        from suite.modalities.audio.mel import RATE, log_mel

        return fold(log_mel(as_tensor([at_rate(content, RATE)])), self.fold)

    @classmethod
    def check_suffix(cls, suffix: str) -> None:
        """Refuse an ending for which libsndfile has no encoder, or all of them when it is missing."""
        from suite.modalities.audio.files import check_encoder

        check_encoder(suffix)

    @classmethod
    def same(cls, first: Path, second: Path) -> bool:
        """Whether two files decode to the same samples: encoders write their own version into the file."""
        from suite.modalities.audio.files import read

        a, b = read(first), read(second)
        return a.rate == b.rate and a.samples.shape == b.samples.shape and bool((a.samples == b.samples).all())

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        from suite.modalities.shared.words import check_words

        check_words(request.prompts)

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> list[str]:
        from suite.modalities.shared.words import prompt_warnings

        return prompt_warnings(folder, request)

    def metrics(self, artifacts: Sequence[Sound], prompts: Sequence[str]) -> dict[str, float]:
        """Frechet distances to real clips, agreement of tags, and errors of spoken words."""
        from suite.modalities.audio.metrics import evaluate

        return evaluate(artifacts, prompts)
