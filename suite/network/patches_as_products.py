"""Patch embeddings in bfloat16 on a CPU as matrix products, because PyTorch's convolution is wrong there.

torch 2.11's convolution answers noise, and says nothing, when it is given bfloat16 on a CPU with AMX, a kernel of 4 or
8 with an equal stride, and 8 to 28 channels (relative errors of 0.8 to 0.97 for 8 x 8 and 8, 12, 16, 20, 24 or 28
channels; 0.002 for others). Where patches do not overlap, a convolution is a matrix product over patches, which is
right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap; equal to its base but for bfloat16 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and (input.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")):
            return patch_product(input, self.weight, self.bias)
        return F.conv2d(input, self.weight, self.bias, self.stride)


def patches_as_products(module: nn.Module) -> nn.Module:
    """Let every patch embedding in `module` take this way where it must; returns the module, its weights untouched."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and _is_patch_embedding(part):
            part.__class__ = PatchEmbedding  # a mark on the instance would look like a plugin's patch
    return module


def _is_patch_embedding(conv: nn.Conv2d) -> bool:
    apart = conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)
    return apart and conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1


def patch_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] and weight [O, C, kh, kw] -> [B, O, H // kh, W // kw]: the convolution with stride (kh, kw)."""
    (batch, channels, height, width), (kh, kw) = x.shape, weight.shape[2:]
    rows, columns = height // kh, width // kw
    patches = x[:, :, : rows * kh, : columns * kw].reshape(batch, channels, rows, kh, columns, kw)
    flat = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * kh * kw)
    return F.linear(flat, weight.flatten(1), bias).permute(0, 3, 1, 2)
