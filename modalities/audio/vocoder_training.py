"""Train the vocoder's network on real sound: magnitudes of its spectrum, by their logarithms and by their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.modalities.audio.data import load_waves
from suite.modalities.audio.mel import FRAMES, HOP, log_mel, spectrum
from suite.modalities.audio.vocoder import Vocoder
from suite.training.config import read_training
from suite.training.loop import TrainOptions, averaged_weights
from suite.training.loop import train as run_training

_FLOOR = 1e-4
"""Magnitudes are compared as logarithms above this, 128 dB below a full-scale sine."""


@dataclass(frozen=True)
class VocoderTraining:
    """One training recipe: `model` gives Vocoder's arguments; crops of `frames`; `jitter` is noise on the pictures."""

    name: str
    kind: str = "vocoder"
    model: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 16
    frames: int = 64
    jitter: float = 0.02
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if self.batch < 1 or not 16 <= self.frames <= FRAMES or self.jitter < 0:
            raise ConfigError(f"batch must be 1 or more, frames in 16 to {FRAMES}, and jitter 0 or more")


def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train the vocoder as `config_path` says on `audio-waves.safetensors`; returns the folder of the network."""
    config, waves, out = read_training(VocoderTraining, config_path, overrides), load_waves(data), Path(out)
    torch.manual_seed(config.train.seed)
    try:
        network = Vocoder(**config.model)
    except TypeError as error:
        raise ConfigError(f"model: the vocoder refuses these settings: {error}") from error
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    sound = waves.sound[waves.held_out :].to(device)
    where = "cpu" if device.type == "cpu" else "auto"
    state = run_training(network, make_loss(sound, config), config.train, out, resume, minutes, None, where)
    if state.interrupted:
        return out
    weights = averaged_weights(state, config.train.average)
    finished = Vocoder(**config.model)
    finished.load_state_dict(weights)
    finished.half().save_pretrained(out / "vocoder")
    return out / "vocoder"


def make_loss(sound: Tensor, config: VocoderTraining) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(network, generator)` of a batch of crops of `sound` int16 [N, S], at random loudness."""
    length = config.frames * HOP

    def loss(network: nn.Module, rng: torch.Generator) -> Tensor:
        device = sound.device
        rows = torch.randint(len(sound), (config.batch,), device=device, generator=rng)
        starts = torch.randint(sound.shape[1] - length + 1, (config.batch,), device=device, generator=rng)
        gain = torch.exp(-1.5 * torch.rand(config.batch, 1, device=device, generator=rng))
        span = torch.arange(length, device=device)
        real = gain * sound[rows[:, None], starts[:, None] + span].float() / 32767
        pictures = log_mel(real)
        pictures = pictures + config.jitter * torch.randn(pictures.shape, device=device, generator=rng)
        logarithm = network(pictures).float()
        return compare(logarithm, spectrum(real).abs())

    return loss


def compare(logarithm: Tensor, target: Tensor) -> Tensor:
    """Mean distance of logarithms, plus spectral convergence: both [N, 513, F], the target as magnitude."""
    floor = torch.tensor(_FLOOR, device=target.device)
    distance = (logarithm.maximum(floor.log()) - target.maximum(floor).log()).abs().mean()
    error = (logarithm.exp() - target).flatten(1).norm(dim=1)
    return distance + (error / target.flatten(1).norm(dim=1).clamp(min=1.0)).mean()
