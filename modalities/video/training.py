"""Train a captioned-video model from a YAML file: a Latte transformer of diffusers over tubes of frames.

Noise is the flow family, x_t = (1 - t) x0 + t eps, t in [0, 1] with 1 the prior, x0 the tube code of a clip; the
network gets 1000 t. It predicts x0, and its error is weighted as in velocity space: |x0_hat - x0|^2 / max(t, floor)^2.
Clips are loops: each is rolled in time by a random number of frames. The result is a diffusers-layout folder with
half-precision averaged weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files.output import write
from suite.host.models import open_folder
from suite.modalities.image.sheet import sheet
from suite.modalities.shared.caption_table import CaptionTable, named_captions
from suite.modalities.shared.flow import drawn_times
from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.video.config import VideoTraining, read
from suite.modalities.video.data import VideoData, load
from suite.modalities.video.network import begin_with_image, call
from suite.modalities.video.tubes import from_tubes, to_tubes, together
from suite.training.export import export_folder, write_pipeline
from suite.training.loop import TrainState, averaged_weights
from suite.training.loop import train as run_training
from suite.training.stages import in_stages

EXPORT = "model"
"""Sub-folder of a run that gets the finished model."""
SHEET = 8
"""Captions on a sheet, if the configuration names none."""
CLASS = "LatteTransformer3DModel"
NETWORK = "transformer"
SHARD = "13MB"
"""Largest file of weights: two parts of a shipped model, which stay easy to carry."""


@dataclass(frozen=True)
class Batches:
    """Training data on its device: draws clips and a caption each, rolls them, and drops captions for guidance.

    `clips` uint8 [N, F, 4, S, S].
    """

    clips: Tensor
    captions: CaptionTable

    def draw(self, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        """Clips [B, 4, F, S, S] float32 in [-1, 1], and the captions' states."""
        device, frames = self.clips.device, self.clips.shape[1]
        index = torch.randint(len(self.clips), (batch,), device=device, generator=rng)
        caption = self.captions.draw(index, dropout, rng)
        first = torch.randint(frames, (batch, 1), device=device, generator=rng)
        order = (first + torch.arange(frames, device=device)) % frames
        clips = self.clips[index[:, None], order].float() / 127.5 - 1
        return clips.transpose(1, 2), self.captions.conditions(caption)


@in_stages
def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train as `config_path` says, on the file that `suite data prepare video` wrote; returns the model folder.

    `overrides` are `key=value` with dotted keys, such as `train.lr=1e-3`. `out` gets checkpoints, loss.csv, sheets
    `samples-<step>.png` and, unless the run was stopped early by Ctrl-C, the folder `model`.
    """
    config, clips, out = read(config_path, overrides), load(data), Path(out)
    torch.manual_seed(config.train.seed)
    network = build(config)
    if config.start:
        begin_with_image(network, weights_of(config.start))
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    batches = make_batches(clips, config, device)
    shown = named_captions(clips.captions, config.sheet, SHEET).to(device)
    conditions, null = batches.captions.conditions(shown), batches.captions.null

    def draw_sheet(model: nn.Module, step: int) -> None:
        save_sheet(sample(model, conditions, config, null), out / f"samples-{step:06d}.png")

    where = "cpu" if device.type == "cpu" else "auto"
    state = run_training(network, flow_loss(batches, config), config.train, out, resume, minutes, draw_sheet, where)
    return out if state.interrupted else export_state(state, config, out / EXPORT, out / "loss.csv")


def build(config: VideoTraining) -> nn.Module:
    """The network that the configuration describes, with fresh weights."""
    import diffusers

    try:
        network = getattr(diffusers, CLASS)(**config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {CLASS} refuses these settings: {error}") from error
    channels, tubes, size, _ = config.shape
    expected = {"in_channels": channels, "video_length": tubes, "sample_size": size}
    for key, value in expected.items():
        if network.config[key] != value:
            raise ConfigError(f"model.{key} is {network.config[key]}, but clip and tube ask for {value}")
    return network


def weights_of(model: str) -> Path:
    """The weights of an image model's transformer: a shipped name, or a folder."""
    folder = open_folder(model, "image")
    if folder.fact("network") != NETWORK:
        raise ConfigError(f"start: the image model {model} has no transformer, so a video model cannot begin with it")
    return folder.path / NETWORK / "diffusion_pytorch_model.safetensors"


def make_batches(data: VideoData, config: VideoTraining, device: torch.device) -> Batches:
    """Clips and all captions on `device`. Raises ConfigError when the clips are not those that the model is for."""
    have, want = list(data.clips.shape[1:]), [config.clip[i] for i in (1, 0, 2, 3)]
    if have != want:
        raise ConfigError(f"The training set has clips of [frames, channels, height, width] {have}, the model {want}")
    captions = CaptionTable.of(data, data.captions_of(), config.text_length, device)
    return Batches(data.clips.to(device), captions)


def flow_loss(batches: Batches, config: VideoTraining) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(network, generator)` of one batch; see the head of this file."""

    times = drawn_times(config.times, config.time_mean, config.time_std)

    def loss(network: nn.Module, rng: torch.Generator) -> Tensor:
        clips, text = batches.draw(config.batch, config.caption_dropout, rng)
        x0 = to_tubes(clips, config.tube, config.gain)
        t = times(len(x0), rng).to(x0.device)
        noise = together(torch.randn(x0.shape, device=x0.device, generator=rng), config.shared)
        at = t.view(-1, 1, 1, 1, 1)
        error = call(network, (1 - at) * x0 + at * noise, 1000 * t, text.states, text.mask).float() - x0
        return (error / at.clamp(min=config.time_floor)).square().mean()

    return loss


def sample(
    network: nn.Module,
    text: TokenStates,
    config: VideoTraining,
    null: TokenStates,
    steps: int = 16,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Clips [N, 4, F, S, S] in [-1, 1], by Euler steps of the flow with classifier-free guidance.

    Only for looking at a run in progress; the suite's engine has the solvers.
    """
    count, device = len(text), text.states.device
    x = torch.randn(count, *config.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    x = together(x, config.shared)
    states = torch.cat([text.states, null.states.expand(count, -1, -1)])
    mask = torch.cat([text.mask, null.mask.expand(count, -1)])
    with torch.no_grad():
        for t, s in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            at = torch.full((2 * count,), 1000 * t, device=device)
            conditional, free = call(network, torch.cat([x, x]), at, states, mask).float().chunk(2)
            x0 = free + guidance * (conditional - free)
            x = x0 + (s / t) * (x - x0)
    return from_tubes(x, config.tube, config.gain).clamp(-1, 1)


def save_sheet(clips: Tensor, path: Path, columns: int = 8) -> None:
    """Write clips [N, C, F, S, S] in [-1, 1] as one PNG: a row a clip, `columns` frames of it."""
    pixels = ((clips[:, :3].cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
    chosen = torch.linspace(0, pixels.shape[1], columns + 1)[:-1].long()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sheet([Image.fromarray(p) for p in pixels[:, chosen].flatten(0, 1).numpy()], columns)
    write(path, lambda made: picture.save(made, format="PNG"))


def export_state(state: TrainState, config: VideoTraining, out: Path, log: Path | None = None) -> Path:
    """`export` of the averaged weights of a training state."""
    return export(averaged_weights(state, config.train.average), config, out, log)


def export(weights: Mapping[str, Tensor], config: VideoTraining, out: Path, log: Path | None = None) -> Path:
    """Write a model folder: transformer/ in float16, suite.json, diffusers' pipeline files, loss.csv.

    An existing folder keeps its other files. Raises ConfigError when weights do not fit float16.
    """
    return export_folder(
        build(config), weights, NETWORK, description(config), out, extra_files, log, max_shard_size=SHARD
    )


def extra_files(folder: Path) -> None:
    """What diffusers' LattePipeline needs to open the folder.

    There are no text encoder, tokenizer and VAE in it: pass them as None, and prompts as `prompt_embeds` without
    padding, because that pipeline passes no mask on.
    """
    absent = ("tokenizer", "text_encoder", "vae")
    # Unless variances are learned, that pipeline takes half of the channels for them; they are unused here.
    write_pipeline(folder, "LattePipeline", absent, NETWORK, CLASS, variance_type="learned")


def description(config: VideoTraining) -> dict[str, Any]:
    """Content of suite.json: what diffusers' own files have no word for."""
    return {
        "name": config.name,
        "modality": "video",
        "network": NETWORK,
        "noise": {"family": "flow"},
        "prediction": "sample",
        "text": {"encoder": "minilm", "length": config.text_length},
        "shape": list(config.shape),
        "clip": list(config.clip),
        "codec": {"kind": "dct-tubes", "length": config.tube, "gain": config.gain, "shared": config.shared},
        "rate": config.rate,
        "defaults": dict(config.defaults),
    }
