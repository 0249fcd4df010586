"""Train a captioned-image model from a YAML file: a transformer (PixArt class) or a U-Net, both of diffusers.

Noise, prediction and loss are those of `suite.modalities.shared.flow`. The result is a diffusers-layout folder with
half-precision averaged weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.image.config import ImageTraining, read
from suite.modalities.image.data import ImageData, load
from suite.modalities.image.sheet import sheet
from suite.modalities.shared.caption_table import CaptionTable, named_captions
from suite.modalities.shared.flow import flow_loss, sample
from suite.modalities.shared.text_encoder import TokenStates
from suite.training.export import export_folder, write_pipeline
from suite.training.loop import TrainState, averaged_weights
from suite.training.loop import train as run_training
from suite.training.stages import in_stages

EXPORT = "model"
"""Sub-folder of a run that gets the finished model."""
SHEET = 32
"""Captions on a sheet, if the configuration names none."""

CLASSES = {"transformer": "PixArtTransformer2DModel", "unet": "UNet2DConditionModel"}
"""diffusers' class of each kind of network."""

PIPELINES = {
    "transformer": ("PixArtAlphaPipeline", ("tokenizer", "text_encoder", "vae")),
    "unet": (
        "StableDiffusionPipeline",
        ("tokenizer", "text_encoder", "vae", "safety_checker", "feature_extractor", "image_encoder"),
    ),
}
"""diffusers' pipeline that opens a folder, and the parts of it that the folder does not hold."""


@dataclass(frozen=True)
class Batches:
    """Training data on its device: draws pictures by style, one caption each, and drops captions for guidance.

    `pictures` uint8 [N, 3, S, S]; `chances` [N].
    """

    pictures: Tensor
    chances: Tensor
    captions: CaptionTable

    def draw(self, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        """x0 [B, 3, S, S] float32 in [-1, 1], and the captions' states."""
        index = torch.multinomial(self.chances, batch, replacement=True, generator=rng)
        caption = self.captions.draw(index, dropout, rng)
        return self.pictures[index].float() / 127.5 - 1, self.captions.conditions(caption)


@in_stages
def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train as `config_path` says, on the file that `suite data prepare image` wrote; returns the model folder.

    `overrides` are `key=value` with dotted keys, such as `train.lr=1e-3`. `out` gets checkpoints, loss.csv, sheets
    `samples-<step>.png` and, unless the run was stopped early by Ctrl-C, the folder `model`.
    """
    config, pictures, out = read(config_path, overrides), load(data), Path(out)
    torch.manual_seed(config.train.seed)
    network = build(config)
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    batches = make_batches(pictures, config, device)
    shown = named_captions(pictures.captions, config.sheet, SHEET).to(device)
    conditions, null = batches.captions.conditions(shown), batches.captions.null

    def draw_sheet(model: nn.Module, step: int) -> None:
        save_sheet(sample(model, conditions, config.shape, null), out / f"samples-{step:06d}.png")

    def draw(rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        return batches.draw(config.batch, config.caption_dropout, rng)

    where = "cpu" if device.type == "cpu" else "auto"
    loss = flow_loss(
        draw, config.time_mean, config.time_std, config.time_floor, config.immiscible, schedule=config.times
    )
    state = run_training(network, loss, config.train, out, resume, minutes, draw_sheet, where)
    return out if state.interrupted else export_state(state, config, out / EXPORT, out / "loss.csv")


def build(config: ImageTraining) -> nn.Module:
    """The network that the configuration describes, with fresh weights."""
    import diffusers

    try:
        return getattr(diffusers, CLASSES[config.network])(**config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {CLASSES[config.network]} refuses these settings: {error}") from error


def make_batches(data: ImageData, config: ImageTraining, device: torch.device) -> Batches:
    """Pictures at the model's size and all captions, on `device`; each style gets its share of the draws."""
    if absent := [s for s, share in config.styles.items() if share > 0 and s not in data.styles]:
        have = ", ".join(sorted(set(data.styles)))
        raise ConfigError(f"The training set has no style {absent[0]!r}, only {have}: prepare it with that style")
    counts = {s: data.styles.count(s) for s in set(data.styles)}
    chances = torch.tensor([config.styles.get(s, 0.0) / counts[s] for s in data.styles])
    captions = CaptionTable.of(data, data.captions_of(), config.text_length, device)
    return Batches(resized(data.pictures, config.shape[-1]).to(device), chances.to(device), captions)


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures uint8 [N, 3, S, S] averaged down to `size`; S must be a multiple of it."""
    side = pictures.shape[-1]
    if side == size:
        return pictures
    if side % size:
        raise ConfigError(f"The training set is {side} px, the model {size} px: prepare it with --size {size}")
    parts = [F.avg_pool2d(part.float(), side // size).round().to(torch.uint8) for part in pictures.split(256)]
    return torch.cat(parts)


def save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures [N, 3, S, S] in [-1, 1] as one PNG."""
    pixels = ((pictures.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sheet([Image.fromarray(p) for p in pixels], columns)
    write(path, lambda made: picture.save(made, format="PNG"))


def export_state(
    state: TrainState,
    config: ImageTraining,
    out: Path,
    log: Path | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the model folder of the averaged weights of a training state."""
    return export(averaged_weights(state, config.train.average), config, out, log, facts)


def export(
    weights: Mapping[str, Tensor],
    config: ImageTraining,
    out: Path,
    log: Path | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a model folder: transformer/ or unet/ in float16, suite.json, diffusers' pipeline files, loss.csv.

    `facts` go over those of `description`. An existing folder keeps its other files. Raises ConfigError when weights
    do not fit float16.
    """
    pipeline, absent = PIPELINES[config.network]

    def extra(folder: Path) -> None:
        write_pipeline(folder, pipeline, absent, config.network, CLASSES[config.network])

    return export_folder(build(config), weights, config.network, description(config) | dict(facts), out, extra, log)


def description(config: ImageTraining) -> dict[str, Any]:
    """Content of suite.json: what diffusers' own files have no word for."""
    return {
        "name": config.name,
        "modality": "image",
        "network": config.network,
        "noise": {"family": "flow"},
        "prediction": "sample",
        "text": {"encoder": "minilm", "length": config.text_length},
        "shape": list(config.shape),
        "range": [-1, 1],
        "defaults": dict(config.defaults),
    }
