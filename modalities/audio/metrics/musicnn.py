"""Music features and tags: musicnn (Pons and Serra 2019, arXiv 1909.06654), trained on MagnaTagATune, in PyTorch.

The weights are those of the package musicnn 0.1.0 (ISC licence), converted by fit_musicnn.py; nothing is fetched.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.audio.mel import RATE
from suite.observe.finite import load_finite

WIDTH = 200
"""Channels of a feature: the layer before the tags."""
TAGS = tuple(
    """guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,vocal,synth,female,
    indian,opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,woman,male vocal,no vocal,pop,soft,sitar,
    solo,man,classic,choir,voice,new age,dance,male voice,female vocal,beats,harp,cello,no voice,weird,country,metal,
    female voice,choral""".replace("\n    ", "").split(",")
)
WEIGHTS = Path(__file__).parent / "weights" / "musicnn.safetensors"

_WINDOW, _HOP, _BANDS = 512, 256, 96


def features(sounds: Tensor, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Features [N, 200] and probabilities of the tags [N, 50] of sounds [N, S], float at 16 kHz, 1 s or more.

    The network was trained on 3 s; its layers pool over time, so other lengths work and are compared among equals.
    """
    if sounds.ndim != 2 or sounds.shape[1] < RATE:
        raise ConfigError(f"sounds have shape {tuple(sounds.shape)}, expected [N, S] with S of {RATE} or more")
    weights = _weights()
    with torch.inference_mode():
        parts = [_network(log_mel(part.float()), weights) for part in sounds.split(batch)]
        return torch.cat([p[0] for p in parts]).clone(), torch.cat([p[1] for p in parts]).sigmoid().clone()


def log_mel(sounds: Tensor) -> Tensor:
    """What the network reads, [N, frames, 96]: log10(10^4 power + 1) in mel bands, librosa's defaults of 2019."""
    from torchaudio.functional import melscale_fbanks

    window = torch.hann_window(_WINDOW, device=sounds.device)
    spectra = torch.stft(sounds, _WINDOW, _HOP, window=window, center=True, pad_mode="constant", return_complex=True)
    bank = melscale_fbanks(_WINDOW // 2 + 1, 0.0, RATE / 2, _BANDS, RATE, norm="slaney", mel_scale="slaney")
    return torch.log10(1e4 * (spectra.abs().square().transpose(1, 2) @ bank) + 1)


def _network(mel: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = _norm(mel[:, None], w, 0)
    wide = F.pad(x, (0, 0, 3, 3))
    timbre = [_norm(_conv(wide, w, k), w, k + 1).amax(3) for k in (0, 1)]
    # Long kernels along time keep the length: TensorFlow's "SAME" puts the odd frame behind.
    rhythm = [_norm(_conv(_same(x, w[f"conv.{k}.kernel"].shape[2]), w, k), w, k + 1).amax(3) for k in (2, 3, 4)]
    front = torch.cat(timbre + rhythm, 1).transpose(1, 2)[:, None]  # [N, 1, T, 561]
    a = _norm(_conv(F.pad(front, (0, 0, 3, 3)), w, 5), w, 6).permute(0, 3, 2, 1)
    b = _norm(_conv(F.pad(a, (0, 0, 3, 3)), w, 6), w, 7).permute(0, 3, 2, 1) + a
    c = _norm(_conv(F.pad(b, (0, 0, 3, 3)), w, 7), w, 8).permute(0, 3, 2, 1) + b
    frames = torch.cat([front, a, b, c], 3)[:, 0]
    pooled = torch.stack([frames.amax(1), frames.mean(1)], 2).flatten(1)
    hidden = _norm(F.relu(F.linear(_norm(pooled, w, 9), w["dense.0.kernel"], w["dense.0.bias"])), w, 10)
    return hidden, F.linear(hidden, w["dense.1.kernel"], w["dense.1.bias"])


def _same(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, 0, (size - 1) // 2, size - 1 - (size - 1) // 2))


def _conv(x: Tensor, w: dict[str, Tensor], k: int) -> Tensor:
    return F.relu(F.conv2d(x, w[f"conv.{k}.kernel"], w[f"conv.{k}.bias"]))


def _norm(x: Tensor, w: dict[str, Tensor], k: int) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    return x * w[f"norm.{k}.scale"].reshape(shape) + w[f"norm.{k}.shift"].reshape(shape)


@lru_cache(maxsize=1)
def _weights() -> dict[str, Tensor]:
    try:
        return {name: value.float() for name, value in load_finite(WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The weights {WEIGHTS} cannot be read ({error}): reinstall, or make them again with "
            "python -m suite.modalities.audio.metrics.fit_musicnn"
        ) from error
