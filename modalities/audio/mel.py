"""Sound <-> pictures of it: log-mel spectrograms as [bands, frames] in [-1, 1].

A frame is 16 ms (256 samples of 16 kHz), a window four of them; magnitudes are summed in 80 mel bands (Slaney's
scale and area) and their natural logarithm is mapped from [LOW, HIGH] onto [-1, 1]. What lies below is silence.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from suite.errors import ConfigError

RATE = 16_000
HOP = 256
WINDOW = 1024
BANDS = 80
FRAMES = 128
SAMPLES = HOP * FRAMES
"""Samples of a clip: 32,768, which is 2.048 s."""
LOW, HIGH = -10.0, 1.0
"""Natural logarithms of mel magnitude that are -1 and 1: a range of 96 dB."""


def spectrum(sound: Tensor) -> Tensor:
    """Complex short-time spectrum [N, 513, F] of sound [N, S]; F = S / 256, frame k centred at sample 256 k."""
    if sound.ndim != 2 or sound.shape[1] % HOP or sound.shape[1] < WINDOW:
        raise ConfigError(
            f"sound has shape {tuple(sound.shape)}, expected [N, S] with S a multiple of {HOP} and {WINDOW} or more"
        )
    window = torch.hann_window(WINDOW, device=sound.device)
    full = torch.stft(sound.float(), WINDOW, HOP, window=window, center=True, return_complex=True)
    return full[..., :-1]


def sound_of(spectra: Tensor) -> Tensor:
    """Sound [N, 256 F] of short-time spectra [N, 513, F]: the inverse of `spectrum`."""
    window = torch.hann_window(WINDOW, device=spectra.device)
    full = torch.cat([spectra, spectra[..., -1:]], -1)
    return torch.istft(full, WINDOW, HOP, window=window, center=True, length=HOP * spectra.shape[-1])


def log_mel(sound: Tensor) -> Tensor:
    """Pictures [N, 80, F] in [-1, 1] of sound [N, S] in [-1, 1] at 16 kHz."""
    mel = filterbank().to(sound.device) @ spectrum(sound).abs()
    return to_picture(mel.clamp(min=1e-12).log())


def faded(sound: Tensor, samples: int = 256) -> Tensor:
    """The same sound [N, S] with its last `samples` going to nothing, so that a cut makes no click."""
    out = sound.clone()
    out[:, -samples:] *= torch.linspace(1, 0, samples, device=sound.device)
    return out


def to_picture(logarithm: Tensor) -> Tensor:
    """Natural logarithms of mel magnitude -> [-1, 1], clipped."""
    return ((logarithm - LOW) * (2 / (HIGH - LOW)) - 1).clamp(-1, 1)


def to_logarithm(picture: Tensor) -> Tensor:
    """[-1, 1] -> natural logarithms of mel magnitude."""
    return (picture.clamp(-1, 1) + 1) * ((HIGH - LOW) / 2) + LOW


@lru_cache(maxsize=1)
def filterbank() -> Tensor:
    """Mel weights [80, 513], by torchaudio."""
    try:
        from torchaudio.functional import melscale_fbanks
    except (ImportError, OSError) as error:  # OSError: its compiled part does not fit this PyTorch
        raise ConfigError(
            f"Sound needs torchaudio, which cannot be loaded ({error}). Type: pip install "
            "'efficient-diffusion-suite[audio]'"
        ) from error

    with torch.inference_mode(False):  # it is kept, and training wants it after sampling has made it
        weights = melscale_fbanks(WINDOW // 2 + 1, 0.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney")
        return weights.T.contiguous()
