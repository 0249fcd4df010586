"""What is lost on the way sound -> picture -> sound: on clips that no training saw, for several ways back.

python -m suite.modalities.audio.metrics.reconstruction --data audio-waves.safetensors --vocoder FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from suite.modalities.audio.data import load_waves
from suite.modalities.audio.mel import log_mel
from suite.modalities.audio.metrics import embedding, musicnn
from suite.modalities.audio.metrics.reference import load_reference
from suite.modalities.audio.metrics.transcript import transcribe, word_errors
from suite.modalities.audio.vocoder import open_vocoder, plain_inverse

WINDOWS = (512, 1024, 2048)


def si_sdr(made: Tensor, real: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB [N] of sounds [N, S] (Le Roux et al. 2019, arXiv 1811.02508).

    Compares waveforms, so it counts every difference of phase, which ears hardly hear.
    """
    scale = (made * real).sum(1, keepdim=True) / real.square().sum(1, keepdim=True).clamp(min=1e-12)
    target = scale * real
    noise = (made - target).square().sum(1).clamp(min=1e-12)
    return 10 * torch.log10(target.square().sum(1).clamp(min=1e-12) / noise)


def stft_distance(made: Tensor, real: Tensor, floor: float = 1e-3) -> Tensor:
    """Multi-resolution spectral distance [N]: mean |ln| of magnitudes above `floor` of the loudest, plus convergence.

    Windows of 512, 1024 and 2048 samples, hops of a quarter (Yamamoto et al. 2020, arXiv 1910.11480).
    """
    total = made.new_zeros(len(made))
    for window in WINDOWS:
        shape = torch.hann_window(window, device=made.device)
        a, b = (torch.stft(x, window, window // 4, window=shape, return_complex=True).abs() for x in (made, real))
        least = floor * b.amax((1, 2), keepdim=True).clamp(min=1e-9)
        logarithms = (a.maximum(least).log() - b.maximum(least).log()).abs().mean((1, 2))
        convergence = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-9)
        total = total + (logarithms + convergence) / len(WINDOWS)
    return total


def measure(
    real: Tensor, way: Callable[[Tensor], Tensor], words: list[str | None], cache: Path | None
) -> dict[str, float]:
    """Numbers of the sounds that `way` makes of the pictures of `real` [N, S]; `words` are what some of them say."""
    made = torch.cat([way(log_mel(part)) for part in real.split(16)])
    reference = load_reference()
    said = [k for k, word in enumerate(words) if word]
    heard = transcribe([made[k].numpy() for k in said])
    errors = [word_errors(text, str(words[k])) for text, k in zip(heard, said, strict=True)]
    return {
        "si_sdr": float(si_sdr(made, real).mean()),
        "stft": float(stft_distance(made, real).mean()),
        "mel": float((log_mel(made) - log_mel(real)).abs().mean()),
        "fad_music": reference.music(musicnn.features(made)[0]),
        "fad_speech": reference.speech(embedding.features(made, cache)),
        "wer": sum(errors) / max(1, len(errors)),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Measure what the audio model's pictures and vocoder lose.")
    parser.add_argument("--data", type=Path, required=True, help="audio-waves.safetensors")
    parser.add_argument("--vocoder", type=Path, required=True, help="folder of the vocoder")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the archives")
    parser.add_argument("--clips", type=int, default=0, help="only so many clips; 0 is all that are held out")
    given = parser.parse_args()
    waves = load_waves(given.data)
    count = given.clips or waves.held_out
    real = waves.floats(slice(0, count))
    words = [waves.labels[k] if waves.groups[k] in ("words", "digits") else None for k in range(count)]
    network = open_vocoder(given.vocoder, "cpu")
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "the clips themselves": _itself(real),
        "no network, 16 iterations": plain_inverse,
        "vocoder alone": lambda pictures: network.sound(pictures, 0),
        "vocoder and 16 iterations": lambda pictures: network.sound(pictures, 16),
        "vocoder and 64 iterations": lambda pictures: network.sound(pictures, 64),
    }
    print(
        "| way back | SI-SDR (dB) | STFT | mel | FAD music | FAD speech | word errors |\n|---|---|---|---|---|---|---|"
    )
    for name, way in ways.items():
        with torch.inference_mode():
            numbers = measure(real, way, words, given.cache)
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in numbers.values()) + " |", flush=True)


def _itself(real: Tensor) -> Callable[[Tensor], Tensor]:
    """A way that gives the real sounds back, part by part."""
    parts = iter(real.split(16))
    return lambda pictures: next(parts)


if __name__ == "__main__":
    main()
