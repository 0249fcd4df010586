"""Every shipped network says in bfloat16 what it says in float32, up to rounding: on some processors it did not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from suite.diffusion.rng import SampleRng
from suite.host.discovery import MODALITIES, installed
from suite.host.models import open_folder, shipped
from suite.network.patches_as_products import PatchEmbedding, patch_product, patches_as_products
from suite.request import Request, resolve

sys.path.insert(0, str(Path(__file__).parent))
from _short import prompt

MODELS = [(m, name) for m in installed(MODALITIES) for name in shipped(m)]


def test_there_are_models_of_all_modalities() -> None:
    assert {m for m, _ in MODELS} >= {"image", "video", "text", "audio", "3d"}


@pytest.mark.parametrize(("modality", "name"), MODELS, ids=lambda value: value)
@torch.inference_mode()
def test_bf16_is_float32_up_to_rounding(modality: str, name: str) -> None:
    cls = installed(MODALITIES)[modality].load()
    request = Request((prompt(modality),), options=resolve(cls.options, {}, modality))
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        opened = cls(open_folder(name, modality), "cpu", dtype)
        x = opened.prior(request, SampleRng((0,)))
        x = x.to(dtype) if x.is_floating_point() else x
        time = opened.noise.time_input(torch.tensor([0.7], dtype=torch.float64)).float()
        out = opened.forward(opened.network.module, x, time, opened.encode(request)["cond"]).double()
        answers.append(out.softmax(-1) if opened.noise.discrete else out)
    assert (answers[1] - answers[0]).norm() / answers[0].norm() < 0.06


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 24, 32])
@pytest.mark.parametrize("kernel", [2, 4, 8, (2, 4)])
def test_the_product_is_the_convolution(channels: int, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 32, kernel, stride=kernel).double()
    x = torch.randn(2, channels, 33, 32, dtype=torch.float64)
    torch.testing.assert_close(patch_product(x, conv.weight, conv.bias), conv(x))
    half, rounded = patches_as_products(nn.Sequential(conv).bfloat16()), x.bfloat16()
    expected = F.conv2d(rounded.double(), conv.weight.double(), conv.bias.double(), stride=kernel)
    assert (half(rounded).double() - expected).norm() / expected.norm() < 0.01


def test_only_patch_embeddings_change_and_only_in_bf16() -> None:
    model = patches_as_products(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 4, stride=4))
    )
    assert [isinstance(part, PatchEmbedding) for part in model] == [False, False, True]
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(model[2](x), F.conv2d(x, model[2].weight, model[2].bias, stride=4))
