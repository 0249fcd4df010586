"""Tokens as real vectors, for the continuous family: the table, what the network is shown, and its estimate of x0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.text.vocabulary import SPECIAL

if TYPE_CHECKING:
    from pathlib import Path

    from suite.diffusion.noise import NoiseSchedule

FILE = "embedding.safetensors"
"""File of the table in a model folder."""


def start(vectors: Tensor, width: int) -> Tensor:
    """Embeddings [V, width] to start from: principal components of sentence vectors [V, C], rows of unit variance.

    Components are whitened half way: words of like meaning stay near each other, and frequent directions do not
    drown the rest. The special tokens mean nothing to a sentence encoder and get random rows.
    """
    centred = vectors.float() - vectors.float().mean(0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    rows = centred @ directions[:width].T / spread[:width].sqrt()
    rows[: len(SPECIAL)] = torch.randn(len(SPECIAL), width, generator=torch.Generator().manual_seed(0))
    return normalised(rows)


def normalised(table: Tensor) -> Tensor:
    """Rows of unit variance: the length is the square root of the width, as the schedule takes data to have."""
    return torch.nn.functional.normalize(table, dim=-1) * math.sqrt(table.shape[-1])


def network_input(x: Tensor, before: Tensor, noise: NoiseSchedule, t: Tensor, network: Any) -> Tensor:
    """What the network gets for a text: [B, L, H] = [x scaled to unit variance | estimate before | time features].

    Args:
        x, before: [B, L, D]; `before` is zero where there is no estimate yet.
        t: [B] times.

    The features are sines and cosines of half the log-SNR, which is what decides how much x says.
    """
    alpha, sigma = (c(t.double())[:, None, None] for c in (noise.alpha, noise.sigma))
    scaled = x / (alpha**2 + sigma**2).sqrt().to(x)
    room = network.config.hidden_size - 2 * x.shape[-1]
    lam = (noise.log_snr(t.double()) / 2).clamp(-10, 10).to(x.dtype)
    rate = 0.2 * 2 ** torch.arange(room // 2, device=x.device, dtype=x.dtype).mul(6 / max(1, room // 2))
    angle = lam[:, None] * rate
    features = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, None].expand(-1, x.shape[1], -1)
    return torch.cat([scaled, before, features], dim=-1)


def estimate(logits: Tensor, table: Tensor) -> Tensor:
    """E[x0] [B, L, D]: the mean embedding under the predicted distribution."""
    return logits.float().softmax(-1) @ table.float()


def read_table(path: Path, network: Any) -> Tensor:
    """The table [V, D] float32 of a model folder. ConfigError when it is damaged or does not fit the network."""
    from safetensors import SafetensorError

    from suite.observe.finite import load_finite

    try:
        table = load_finite(path)["table"]
    except (SafetensorError, OSError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read, it is damaged or incomplete: {error}") from error
    vocabulary, hidden = network.config.vocab_size, network.config.hidden_size
    if table.ndim != 2 or table.shape[0] != vocabulary or 2 * table.shape[1] >= hidden:
        raise ConfigError(
            f"{path}: the table is {list(table.shape)}, expected [{vocabulary}, less than {hidden // 2}], as the "
            "network's input holds two embeddings and the time"
        )
    return normalised(table.float())
