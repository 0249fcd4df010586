"""Train a captioned-image model from a YAML file: a transformer (PixArt class) or a U-Net, both of diffusers.

Noise is the flow family, x_t = (1 - t) x0 + t eps, t in [0, 1] with 1 the prior; the network gets 1000 t. It
predicts x0, and its error is weighted as in velocity space: |x0_hat - x0|^2 / max(t, floor)^2, as the velocity is
(x_t - x0) / t. The result is a diffusers-layout folder with half-precision averaged weights.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.modalities.image.config import ImageTraining, read
from suite.modalities.image.data import ImageData, load
from suite.modalities.image.sheet import sheet
from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.shared.training import TrainState, averaged
from suite.modalities.shared.training import train as run_training

EXPORT = "model"
"""Sub-folder of a run that gets the finished model."""

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

    `pictures` uint8 [N, 3, S, S]; `chances` [N]; `captions` int64 [N, K] into `states` float16 [C, L, 384] and
    `tokens` int64 [C]; caption 0 is the null condition.
    """

    pictures: Tensor
    chances: Tensor
    captions: Tensor
    states: Tensor
    tokens: Tensor

    def draw(self, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, TokenStates]:
        """x0 [B, 3, S, S] float32 in [-1, 1], and the captions' states."""
        device = self.pictures.device
        index = torch.multinomial(self.chances, batch, replacement=True, generator=rng)
        choice = torch.randint(self.captions.shape[1], (batch,), device=device, generator=rng)
        caption = self.captions[index, choice]
        dropped = torch.rand(batch, device=device, generator=rng) < dropout
        return self.pictures[index].float() / 127.5 - 1, self.conditions(caption.masked_fill(dropped, 0))

    def conditions(self, caption: Tensor) -> TokenStates:
        """Token states of these captions."""
        position = torch.arange(self.states.shape[1], device=caption.device)
        return TokenStates(self.states[caption].float(), (position < self.tokens[caption][:, None]).float())


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
    conditions = batches.conditions(sheet_captions(pictures, config).to(device))
    null = batches.conditions(torch.zeros(1, dtype=torch.long, device=device))

    def draw_sheet(model: nn.Module, step: int) -> None:
        save_sheet(sample(model, conditions, config.shape, null), out / f"samples-{step:06d}.png")

    where = "cpu" if device.type == "cpu" else "auto"
    state = run_training(network, flow_loss(batches, config), config.train, out, resume, minutes, draw_sheet, where)
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
    every = torch.arange(len(data.captions))
    states = torch.cat([data.states(part, config.text_length).states.half() for part in every.split(1024)])
    tokens = (data.offsets[1:] - data.offsets[:-1]).clamp(max=config.text_length)
    tensors = (resized(data.pictures, config.shape[-1]), chances, data.captions_of(), states, tokens)
    return Batches(*(tensor.to(device) for tensor in tensors))


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures uint8 [N, 3, S, S] averaged down to `size`; S must be a multiple of it."""
    side = pictures.shape[-1]
    if side == size:
        return pictures
    if side % size:
        raise ConfigError(f"The training set is {side} px, the model {size} px: prepare it with --size {size}")
    parts = [F.avg_pool2d(part.float(), side // size).round().to(torch.uint8) for part in pictures.split(256)]
    return torch.cat(parts)


def predict(network: nn.Module, x: Tensor, t: Tensor, text: TokenStates) -> Tensor:
    """x0_hat of x_t [B, 3, S, S] at times t [B]; the output keeps the network's shape, in float32."""
    extra: dict[str, Any] = {}
    if "PixArt" in type(getattr(network, "_orig_mod", network)).__name__:
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return network(
        x, timestep=1000 * t, encoder_hidden_states=text.states, encoder_attention_mask=text.mask, **extra
    ).sample.float()


def flow_loss(batches: Batches, config: ImageTraining) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(network, generator)` of one batch; see the head of this file."""

    def loss(network: nn.Module, rng: torch.Generator) -> Tensor:
        x0, text = batches.draw(config.batch, config.caption_dropout, rng)
        normal = torch.randn(len(x0), device=x0.device, generator=rng)
        t = torch.sigmoid(config.time_mean + config.time_std * normal)
        noise = torch.randn(x0.shape, device=x0.device, generator=rng)
        if config.immiscible:
            noise = noise[assign(x0, noise)]
        at = t.view(-1, 1, 1, 1)
        error = predict(network, (1 - at) * x0 + at * noise, t, text) - x0
        return (error / at.clamp(min=config.time_floor)).square().mean()

    return loss


def assign(x0: Tensor, noise: Tensor) -> Tensor:
    """The permutation [B] of `noise` that makes the sum of squared distances to `x0` smallest, exactly.

    Immiscible diffusion (Li et al., 2024): every picture is paired with noise that is near it. Norms do not depend
    on the pairing, so the inner products decide.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("immiscible: true needs scipy, which is not installed. Type: pip install scipy") from None
    cost = -(x0.flatten(1).double() @ noise.flatten(1).double().T)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=noise.device)


def sheet_captions(data: ImageData, config: ImageTraining, count: int = 32) -> Tensor:
    """Caption indices for the sheet: those that the configuration names, or some spread evenly over the data."""
    if not config.sheet:
        return torch.linspace(1, len(data.captions) - 1, min(count, len(data.captions) - 1)).long()
    where = {text: k for k, text in reversed(list(enumerate(data.captions)))}
    if absent := [text for text in config.sheet if text not in where]:
        raise ConfigError(f"sheet: the training set has no caption {absent[0]!r}; sheets show captions of the data")
    return torch.tensor([where[text] for text in config.sheet])


def sample(
    network: nn.Module,
    text: TokenStates,
    shape: Sequence[int],
    null: TokenStates,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Pictures [N, 3, S, S] in [-1, 1], by Euler steps of the flow with classifier-free guidance.

    Only for looking at a run in progress; the suite's engine has the solvers.
    """
    count, device = len(text), text.states.device
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    both = TokenStates(
        torch.cat([text.states, null.states.expand(count, -1, -1)]), torch.cat([text.mask, null.mask.expand(count, -1)])
    )
    times = torch.linspace(1, 0, steps + 1).tolist()
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            at = torch.full((2 * count,), t, device=device)
            conditional, free = predict(network, torch.cat([x, x]), at, both).chunk(2)
            x0 = free + guidance * (conditional - free)
            x = x0 + (s / t) * (x - x0)
    return x.clamp(-1, 1)


def save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures [N, 3, S, S] in [-1, 1] as one PNG."""
    pixels = ((pictures.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet([Image.fromarray(p) for p in pixels], columns).save(path)


def export_state(state: TrainState, config: ImageTraining, out: Path, log: Path | None = None) -> Path:
    """`export` of the averaged weights of a training state."""
    with averaged(state) as network:
        weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    return export(weights, config, out, log)


def export(weights: Mapping[str, Tensor], config: ImageTraining, out: Path, log: Path | None = None) -> Path:
    """Write a model folder: transformer/ or unet/ in float16, suite.json, diffusers' pipeline files, loss.csv.

    An existing folder keeps its other files. Raises ConfigError when weights do not fit float16.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.half()).all():
            raise ConfigError(f"{name} has values that float16 cannot hold: the run diverged, so there is no model")
    network = build(config)
    network.load_state_dict(weights)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.half().save_pretrained(partial / config.network, safe_serialization=True)  # pyright: ignore[reportCallIssue]
    (partial / "suite.json").write_text(json.dumps(description(config), indent=2) + "\n")
    write_pipeline(partial, config)
    if log is not None and log.is_file():
        shutil.copy(log, partial / "loss.csv")
    out.mkdir(parents=True, exist_ok=True)
    for item in sorted(partial.iterdir()):
        target = out / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    partial.rmdir()
    return out


def write_pipeline(folder: Path, config: ImageTraining) -> None:
    """model_index.json and scheduler/, so that a diffusers pipeline opens the folder.

    There are no text encoder, tokenizer and VAE in it: pass them as None, and prompts as `prompt_embeds`.
    """
    import diffusers

    pipeline, absent = PIPELINES[config.network]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index |= {part: [None, None] for part in absent}
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    index[config.network] = ["diffusers", CLASSES[config.network]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.save_config(folder / "scheduler")


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
