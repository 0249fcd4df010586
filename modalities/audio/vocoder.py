"""Pictures of sound -> sound, in two steps: magnitudes by a small network, phases by signal processing.

1. A picture's 80 mel bands are spread over the 513 bins of a spectrum, and a network of ConvNeXt blocks at the frame
   rate (as in Vocos, Siuzdak 2023, arXiv 2306.00814) corrects the result: it sharpens partials that a band blurs.
2. Phases start from the frequencies of the peaks (single pass spectrogram inversion, Beauregard, Harish and Wyse 2015)
   and a few iterations of fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013) make the frames agree.

Of what is lost the magnitudes are the larger part by far, see docs/models/audio.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.input_file import is_file, read_json
from suite.modalities.audio.mel import BANDS, HOP, WINDOW, filterbank, sound_of, spectrum, to_logarithm
from suite.untrusted import Section
from suite.untrusted import check as check_kind
from suite.weights import built, load_weights

BINS = WINDOW // 2 + 1
LOUDEST = 5.6
"""Natural logarithm above which no magnitude is let: a full-scale sine has log(256) = 5.5."""
ITERATIONS = 16
"""Of Griffin-Lim."""
MOMENTUM = 0.99


class Block(nn.Module):
    """ConvNeXt block (Liu et al. 2022) over frames: depthwise convolution of 7 frames, then a wide layer a frame."""

    def __init__(self, width: int, inner: int, scale: float) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, frames] -> the same."""
        y = self.norm(self.near(x).transpose(1, 2))
        y = self.down(F.gelu(self.up(y)))
        return x + (self.scale * y).transpose(1, 2)


class Vocoder(ModelMixin, ConfigMixin):
    """The network; `from_pretrained` opens its folder. Untrained it leaves what `spread` and `agree` make."""

    @register_to_config
    def __init__(self, width: int = 256, inner: int = 768, layers: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv1d(BANDS, width, 7, padding=3)
        self.first_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, inner, 1 / layers) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, BINS)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Natural logarithms of magnitude [N, 513, frames], float32, of pictures [N, 80, frames] in [-1, 1]."""
        x = self.first_norm(self.first(pictures).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        change = self.last(self.last_norm(x.transpose(1, 2))).transpose(1, 2).float()
        return agree((spread(pictures) + change).clamp(max=LOUDEST), pictures)

    def sound(self, pictures: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """Sound float32 [N, 256 frames] of pictures [N, 80, frames] in [-1, 1]; what exceeds full scale is scaled."""
        magnitude = self(pictures.clamp(-1, 1)).exp()
        found = griffin_lim(magnitude, first_phases(magnitude), iterations)
        return found / found.abs().amax(1, keepdim=True).clamp(min=1)


def open_vocoder(folder: Path, device: str) -> Vocoder:
    """The vocoder in `folder` in float32, in eval mode, without gradients.

    Raises ConfigError when a file is missing, damaged, or does not fit.
    """
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    if not config.exists():
        raise ConfigError(f"{folder} is not a vocoder: it has no config.json")
    content = read_json(config, "vocoder description")
    check_kind(content, Section({}), str(config))
    network = built(lambda: _made(content), config, weights.stat().st_size if is_file(weights) else 0)
    assert isinstance(network, Vocoder)
    load_weights(network, weights, "the vocoder")
    # nn.Module's own `to`: diffusers' override logs advice that is meant for from_pretrained.
    nn.Module.to(network, device=device, dtype=torch.float32)
    return network.eval().requires_grad_(False)


def _made(content: Any) -> Vocoder:
    made: Any = Vocoder.from_config(content)
    return made


def spread(pictures: Tensor) -> Tensor:
    """Natural logarithms of magnitude [N, 513, frames]: each bin between the bands that it belongs to."""
    weights = filterbank().to(pictures.device)
    share = weights / weights.sum(0).clamp(min=1e-9)  # [80, 513]: of a bin among its bands
    inside = (share / weights.sum(1, keepdim=True)).T
    with torch.autocast(pictures.device.type, enabled=False):
        magnitude = inside @ to_logarithm(pictures.float()).exp()
    return magnitude.clamp(min=1e-7).log()


def agree(logarithm: Tensor, pictures: Tensor, times: int = 4) -> Tensor:
    """Logarithms of magnitude [N, 513, frames] scaled, band by band, until their own mel bands are the picture's."""
    weights = filterbank().to(pictures.device)
    share = (weights / weights.sum(0).clamp(min=1e-9)).T
    with torch.autocast(pictures.device.type, enabled=False):
        magnitude, mel = logarithm.float().exp(), to_logarithm(pictures.float()).exp()
        for _ in range(times):
            magnitude = magnitude * (share @ (mel / (weights @ magnitude).clamp(min=1e-9)).clamp(0.1, 10))
    return magnitude.clamp(min=1e-9).log()


def first_phases(magnitude: Tensor) -> Tensor:
    """Phases [N, 513, frames] with which the peaks of `magnitude` go on from frame to frame as steady partials.

    Every bin belongs to its nearest peak, whose frequency a parabola through three logarithms gives. Neighbours of a
    peak are in turn opposed, because the window's middle, not its start, is where a partial's phases agree.
    """
    loud = F.pad(magnitude, (0, 0, 1, 1))
    peak = (magnitude > loud[:, :-2]) & (magnitude >= loud[:, 2:])
    peak[:, 0] = True  # so that every bin has a peak below it
    place = torch.arange(magnitude.shape[1], device=magnitude.device)[None, :, None].expand_as(magnitude)
    far = 10 * len(place[0])
    below = torch.where(peak, place, -far).cummax(1).values
    above = torch.where(peak, place, far).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(place - below <= above - place, below, above)
    logarithm = F.pad(magnitude.clamp(min=1e-9).log(), (0, 0, 1, 1), mode="replicate")
    left, middle, right = logarithm[:, :-2], logarithm[:, 1:-1], logarithm[:, 2:]
    offset = (0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)
    advance = (place + offset) * (2 * math.pi * HOP / WINDOW)
    turned = math.pi * (place - nearest)
    now, phases = torch.zeros_like(magnitude[:, :, 0]), []
    for frame in range(magnitude.shape[2]):
        now = (now + advance[:, :, frame]).gather(1, nearest[:, :, frame]) + turned[:, :, frame]
        phases.append(now)
    return torch.stack(phases, 2)


def griffin_lim(magnitude: Tensor, phase: Tensor, iterations: int, momentum: float = MOMENTUM) -> Tensor:
    """Sound [N, 256 frames] whose spectrum has about these magnitudes [N, 513, frames], starting from `phase`."""
    spectra = torch.polar(magnitude, phase)
    before = torch.zeros_like(spectra)
    for _ in range(iterations):
        consistent = spectrum(sound_of(spectra))
        ahead = consistent + momentum * (consistent - before)
        spectra = magnitude * ahead / ahead.abs().clamp(min=1e-9)
        before = consistent
    return sound_of(spectra)


def plain_inverse(pictures: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Sound without a network, to compare with: mel magnitudes spread by non-negative least squares."""
    weights = filterbank().to(pictures.device)
    mel = to_logarithm(pictures).exp()
    magnitude = (torch.linalg.pinv(weights) @ mel).clamp(min=0)
    for _ in range(50):  # multiplicative updates (Lee and Seung 2001)
        magnitude = magnitude.clamp(min=1e-9) * (weights.T @ mel) / (weights.T @ (weights @ magnitude) + 1e-9)
    return griffin_lim(magnitude, first_phases(magnitude), iterations)
