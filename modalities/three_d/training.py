"""Train the camera-conditioned prior: the image modality's network, loss and files, on rendered views.

The network is told the camera by one token after those of the caption (`camera.with_camera`). Half the views are
mirrored, which gives a view of the mirrored object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.host.models import open_folder
from suite.modalities.image.config import ImageTraining
from suite.modalities.image.training import EXPORT, build, export_state, resized, save_sheet
from suite.modalities.shared.caption_table import CaptionTable, named_captions
from suite.modalities.shared.flow import flow_loss, sample
from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.three_d.camera import Cameras, with_camera
from suite.modalities.three_d.data import ViewData, load
from suite.network.weights import load_network
from suite.training.config import read_training
from suite.training.loop import train as run_training
from suite.training.stages import in_stages


@dataclass(frozen=True)
class ViewTraining(ImageTraining):
    """One training recipe: as for an image model; `start` names one with the same network to begin with, or nothing."""

    start: str = ""


SHEET = 4
"""Captions on a sheet, if the configuration names none."""
FACTS = {"modality": "3d", "camera": "token"}
"""What suite.json says of such a model besides what it says of an image model."""


@dataclass(frozen=True)
class ViewBatches:
    """Training data on its device: draws an object, a view, and a caption, which it drops for guidance.

    `pictures` uint8 [N, V, 3, S, S]; `cameras` [N, V, 2].
    """

    pictures: Tensor
    cameras: Tensor
    captions: CaptionTable

    def draw(self, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        """x0 [B, 3, S, S] float32 in [-1, 1], and the states of caption and camera."""
        device, (objects, count) = self.pictures.device, self.pictures.shape[:2]
        index = torch.randint(objects, (batch,), device=device, generator=rng)
        view = torch.randint(count, (batch,), device=device, generator=rng)
        caption = self.captions.draw(index, dropout, rng)
        mirrored = torch.rand(batch, device=device, generator=rng) < 0.5
        x0 = self.pictures[index, view].float() / 127.5 - 1
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        azimuth, elevation = self.cameras[index, view].unbind(-1)
        cameras = Cameras(torch.where(mirrored, -azimuth, azimuth), elevation)
        return x0, self.conditions(caption, cameras)

    def conditions(self, caption: Tensor, cameras: Cameras) -> TokenStates:
        """Token states of these captions, each seen from its camera."""
        return with_camera(self.captions.conditions(caption), cameras)


@in_stages
def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train as `config_path` says, on the file that `suite data prepare 3d` wrote; returns the model folder.

    `overrides` are `key=value` with dotted keys, such as `train.lr=1e-3`. `out` gets checkpoints, loss.csv, sheets
    `samples-<step>.png` (a row an object, from eight sides) and, unless the run was stopped early by Ctrl-C, the
    folder `model`.
    """
    config, seen, out = read_training(ViewTraining, config_path, overrides), load(data), Path(out)
    torch.manual_seed(config.train.seed)
    network = build(config)
    if config.start:
        begin_with(network, config)
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    batches = make_batches(seen, config, device)
    conditions, null = sheet_conditions(seen, config, batches, device)

    def draw_sheet(model: nn.Module, step: int) -> None:
        pictures = sample(model, conditions, config.shape, null)
        save_sheet(pictures, out / f"samples-{step:06d}.png")

    def draw(rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        return batches.draw(config.batch, config.caption_dropout, rng)

    where = "cpu" if device.type == "cpu" else "auto"
    loss = flow_loss(
        draw, config.time_mean, config.time_std, config.time_floor, config.immiscible, schedule=config.times
    )
    state = run_training(network, loss, config.train, out, resume, minutes, draw_sheet, where)
    return out if state.interrupted else export_state(state, config, out / EXPORT, out / "loss.csv", FACTS)


def begin_with(network: nn.Module, config: ViewTraining) -> None:
    """Take the weights of the image model `config.start`. ConfigError if its network is another."""
    folder = open_folder(config.start, "image")
    begin = load_network(folder.path / str(folder.fact("network")), "cpu", torch.float32)
    try:
        network.load_state_dict(begin.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"start: the network of {config.start} is not the one of this recipe: {reason}") from error


def make_batches(data: ViewData, config: ImageTraining, device: torch.device) -> ViewBatches:
    """Views at the model's size and all captions, on `device`."""
    flat = resized(data.pictures.flatten(0, 1), config.shape[-1])
    pictures = flat.view(*data.pictures.shape[:2], *flat.shape[1:]).to(device)
    captions = CaptionTable.of(data, data.captions_of(), config.text_length, device)
    return ViewBatches(pictures, data.cameras.to(device), captions)


def sheet_conditions(
    data: ViewData, config: ImageTraining, batches: ViewBatches, device: torch.device, sides: int = 8
) -> tuple[TokenStates, TokenStates]:
    """Conditions of each caption of the configuration's `sheet` from `sides` azimuths, and the same without words."""
    shown = named_captions(data.captions, config.sheet, SHEET).to(device)
    caption = shown.repeat_interleave(sides)
    azimuth = (torch.arange(sides, device=device) * (2 * math.pi / sides)).repeat(len(shown))
    cameras = Cameras(azimuth, torch.full_like(azimuth, math.radians(20)))
    return batches.conditions(caption, cameras), batches.conditions(torch.zeros_like(caption), cameras)
