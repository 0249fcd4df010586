"""Train the audio generator from a YAML file: diffusers' PixArt transformer over folded pictures of sound.

Noise, prediction and loss are those of `suite.modalities.shared.flow`. The result is a diffusers-layout folder with
half-precision averaged weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.modalities.audio import vocoder_training
from suite.modalities.audio.config import AudioTraining, kind_of, read
from suite.modalities.audio.data import AudioData, load
from suite.modalities.audio.fold import fold, unfold
from suite.modalities.audio.sheet import save_spectrograms
from suite.modalities.shared.caption_table import CaptionTable, named_captions
from suite.modalities.shared.flow import flow_loss, sample
from suite.modalities.shared.text_encoder import TokenStates
from suite.training.export import export_folder, write_pipeline
from suite.training.loop import TrainState, averaged_weights
from suite.training.loop import train as run_training
from suite.training.stages import in_stages

EXPORT = "model"
"""Sub-folder of a run that gets the finished model."""
SHEET = 16
"""Captions on a sheet, if the configuration names none."""
NETWORK = "PixArtTransformer2DModel"
PIPELINE = "PixArtAlphaPipeline"


@dataclass(frozen=True)
class Batches:
    """Training data on its device: draws clips by group, one caption each, and drops captions for guidance.

    `pictures` uint8 [N, 80, 128]; `chances` [N].
    """

    pictures: Tensor
    chances: Tensor
    captions: CaptionTable
    fold: tuple[int, int]

    def draw(self, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        """x0 [B, C, H, W] float32 in [-1, 1], and the captions' states."""
        index = torch.multinomial(self.chances, batch, replacement=True, generator=rng)
        caption = self.captions.draw(index, dropout, rng)
        x0 = fold(self.pictures[index].float() / 127.5 - 1, self.fold)
        return x0, self.captions.conditions(caption)


@in_stages
def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train as `config_path` says, on a file that `suite data prepare audio` wrote; returns the model folder.

    A file with `kind: vocoder` trains the vocoder (see vocoder_training) on audio-waves.safetensors, any other the
    generator on audio-mel.safetensors.

    `overrides` are `key=value` with dotted keys, such as `train.lr=1e-3`. `out` gets checkpoints, loss.csv,
    spectrograms `samples-<step>.png` and, unless the run was stopped early by Ctrl-C, the folder `model`.
    """
    if kind_of(config_path) == "vocoder":
        return vocoder_training.train(config_path, data, out, resume, overrides, minutes)
    config, clips, out = read(config_path, overrides), load(data), Path(out)
    torch.manual_seed(config.train.seed)
    network = build(config)
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    batches = make_batches(clips, config, device)
    shown = named_captions(clips.texts, config.sheet, SHEET).to(device)
    conditions, null = batches.captions.conditions(shown), batches.captions.null

    def draw_sheet(model: nn.Module, step: int) -> None:
        pictures = unfold(sample(model, conditions, config.shape, null), config.fold)
        save_spectrograms(pictures, out / f"samples-{step:06d}.png")

    def draw(rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        return batches.draw(config.batch, config.caption_dropout, rng)

    loss = flow_loss(draw, config.time_mean, config.time_std, config.time_floor, schedule=config.times)
    where = "cpu" if device.type == "cpu" else "auto"
    state = run_training(network, loss, config.train, out, resume, minutes, draw_sheet, where)
    return out if state.interrupted else export_state(state, config, out / EXPORT, out / "loss.csv")


def build(config: AudioTraining) -> nn.Module:
    """The network that the configuration describes, with fresh weights."""
    import diffusers

    channels = config.shape[0]
    try:
        return getattr(diffusers, NETWORK)(in_channels=channels, out_channels=channels, **config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {NETWORK} refuses these settings: {error}") from error


def make_batches(data: AudioData, config: AudioTraining, device: torch.device) -> Batches:
    """Pictures and all captions, on `device`; each group gets its share of the draws."""
    if absent := [g for g, share in config.shares.items() if share > 0 and g not in data.groups]:
        have = ", ".join(sorted(set(data.groups)))
        raise ConfigError(f"The training set has no group {absent[0]!r}, only {have}")
    counts = {g: data.groups.count(g) for g in set(data.groups)}
    chances = torch.tensor([config.shares.get(g, 0.0) / counts[g] for g in data.groups])
    captions = CaptionTable.of(data.bank, data.captions, config.text_length, device)
    return Batches(data.pictures.to(device), chances.to(device), captions, config.fold)


def export_state(state: TrainState, config: AudioTraining, out: Path, log: Path | None = None) -> Path:
    """Write the model folder of the averaged weights of a training state, with the vocoder if one is named."""

    def extra(folder: Path) -> None:
        write_pipeline(folder, PIPELINE, ("tokenizer", "text_encoder", "vae"), "transformer", NETWORK)
        if config.vocoder:
            shutil.copytree(config.vocoder, folder / "vocoder")

    weights = averaged_weights(state, config.train.average)
    return export_folder(build(config), weights, "transformer", description(config), out, extra, log)


def description(config: AudioTraining) -> dict[str, Any]:
    """Content of suite.json: what diffusers' own files have no word for."""
    return {
        "name": config.name,
        "modality": "audio",
        "network": "transformer",
        "noise": {"family": "flow"},
        "prediction": "sample",
        "text": {"encoder": "minilm", "length": config.text_length},
        "shape": list(config.shape),
        "fold": list(config.fold),
        "range": [-1, 1],
        "defaults": dict(config.defaults),
    }
