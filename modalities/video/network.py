"""The network of the video models, diffusers' Latte (Ma et al. 2024, arXiv 2401.03048): how it is called and begun.

Latte alternates blocks over the patches of one latent frame with blocks over the latent frames of one patch. Its
spatial half has the blocks of PixArt, so it can begin as an image model of the suite: every tube then starts as that
model's picture, standing still, and training adds motion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.observe.finite import load_finite

_BLOCKED = -10000.0
"""Added to the attention score of padding."""


def call(module: nn.Module, x: Tensor, time: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The output of a Latte transformer, [B, C, T, H, W], for codes x of that shape.

    `time` [B] in the network's units, `states` [B, L, 384] and `mask` [B, L] of the prompts.
    """
    # The class hands the mask to its attention as it is: one row for every latent frame, as scores to add.
    scores = ((1 - mask.to(x.dtype)) * _BLOCKED)[:, None].repeat_interleave(x.shape[2], 0)
    return module(x, timestep=time, encoder_hidden_states=states, encoder_attention_mask=scores, return_dict=False)[0]


def patch_size(module: nn.Module) -> int:
    """Side of the squares of a latent frame that are one token."""
    return int(cast(Any, module).config.patch_size)


@torch.no_grad()
def begin_with_image(module: nn.Module, weights: Path) -> None:
    """Fill the spatial half from the safetensors file of a PixArt transformer; the temporal half begins as identity.

    The picture's channels become the mean of a tube; all others begin at zero.
    Raises ConfigError when the two do not have the same widths, depth and patches.
    """
    source, target = load_finite(weights), module.state_dict()
    own = {n for n in target if not n.startswith("temporal_")}
    if missing := sorted(own - source.keys()):
        raise ConfigError(f"{weights} does not fit as a start: it has no {missing[0]}")
    patch = patch_size(module)
    for name in own:
        value, wanted = source[name].float(), target[name].shape
        if name == "pos_embed.proj.weight":
            value = _padded(value, wanted, 1)
        elif name in ("proj_out.weight", "proj_out.bias"):
            rest = value.shape[1:]
            value = value.reshape(patch * patch, -1, *rest)
            value = _padded(value, (patch * patch, wanted[0] // patch**2, *rest), 1).reshape(wanted)
        if value.shape != wanted:
            raise ConfigError(f"{weights} does not fit as a start: {name} is {tuple(value.shape)}, not {tuple(wanted)}")
        target[name].copy_(value)
    for name, value in target.items():
        if name.startswith("temporal_") and (".to_out." in name or ".ff.net.2." in name):
            value.zero_()


def _padded(value: Tensor, shape: tuple[int, ...] | torch.Size, axis: int) -> Tensor:
    out = value.new_zeros(shape)
    out.narrow(axis, 0, value.shape[axis]).copy_(value)
    return out
