"""Means and covariances of the features of real clips: what Fréchet distances are measured against.

`weights/reference.safetensors` holds those of the training clips in audio-waves.safetensors. To make it again:
python -m suite.modalities.audio.metrics.fit_reference --data audio-waves.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.audio.metrics import embedding, musicnn
from suite.modalities.shared.distances import frechet_distance, moments
from suite.observe.finite import load_finite

FILE = Path(__file__).parent / "weights" / "reference.safetensors"


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of each kind of feature: [200], [200, 200]; [96], [96, 96]."""

    music_moments: tuple[Tensor, Tensor]
    speech_moments: tuple[Tensor, Tensor]

    def music(self, features: Tensor) -> float:
        """Fréchet distance of musicnn features [N, 200]."""
        return frechet_distance(*moments(features), *self.music_moments)

    def speech(self, features: Tensor) -> float:
        """Fréchet distance of speech-embedding features [N, 96]."""
        return frechet_distance(*moments(features), *self.speech_moments)


def save_reference(music: Tensor, speech: Tensor, path: Path) -> None:
    """Write the moments of features [N, 200] and [N, 96]: 0.2 MB."""
    names = ("music_mean", "music_covariance", "speech_mean", "speech_covariance")
    values = (*moments(music), *moments(speech))
    tensors = {name: value.float().contiguous() for name, value in zip(names, values, strict=True)}
    write(path, lambda made: save_file(tensors, made))


@lru_cache(maxsize=2)
def load_reference(path: Path = FILE) -> Reference:
    """Read a reference. Raises ConfigError when the file is absent or damaged."""
    try:
        t = {name: value.double() for name, value in load_finite(path).items()}
        found = Reference((t["music_mean"], t["music_covariance"]), (t["speech_mean"], t["speech_covariance"]))
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"The reference statistics {path} cannot be read ({error}): reinstall, or make them again with "
            "python -m suite.modalities.audio.metrics.fit_reference"
        ) from error
    shapes = [tuple(v.shape) for v in (*found.music_moments, *found.speech_moments)]
    m, s = musicnn.WIDTH, embedding.WIDTH
    if shapes != [(m,), (m, m), (s,), (s, s)]:
        raise ConfigError(f"{path} has shapes {shapes}, expected [({m},), ({m}, {m}), ({s},), ({s}, {s})]")
    return found
