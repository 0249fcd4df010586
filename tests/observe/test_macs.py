"""Multiply-accumulates: equal to the count by hand, for every way in which this suite multiplies."""

import pytest
import torch
from torch import nn

from suite.kernels.int8_linear import Int8Linear
from suite.observe.macs import counting


@pytest.mark.parametrize("inference", [False, True])
def test_products_convolutions_and_attention(inference):
    with torch.inference_mode(inference):
        x, linear, convolution = torch.randn(5, 7), nn.Linear(7, 11), nn.Conv2d(3, 4, 3)
        picture, heads = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 16)
        wider = torch.randn(2, 4, 9, 16)
        with counting() as macs:
            linear(x)
            assert macs() == 5 * 7 * 11
            convolution(picture)
            assert macs() == 385 + 2 * 4 * 6 * 6 * 3 * 9
            before = macs()
            nn.functional.scaled_dot_product_attention(heads, wider, wider)
            assert macs() - before == 2 * 4 * 6 * 9 * (16 + 16)


@pytest.mark.parametrize("compute", ["int_mm", "onednn", "bf16", "fp32"])
def test_int8_layers_count_like_the_layer_they_replace(compute):
    layer = Int8Linear(nn.Linear(32, 48).requires_grad_(False), compute=compute)
    layer(torch.randn(4, 32))  # packs and settles
    with torch.inference_mode(), counting() as macs:
        layer(torch.randn(4, 32))
    assert macs() == 4 * 32 * 48


def test_what_a_cache_skips_is_not_counted(engine_of):
    plain = engine_of({"steps": 8}).generate("a red apple", count_macs=True).report
    cached = engine_of({"steps": 8, "cache": ["fora:interval=2"]}).generate("a red apple", count_macs=True).report
    assert plain.nfe == cached.nfe
    assert 0.4 * plain.macs < cached.macs < 0.6 * plain.macs


def test_macs_are_a_samples_and_only_on_request(engine_of):
    engine = engine_of({"steps": 2})
    one = engine.generate("a red apple", count_macs=True).report.macs
    two = engine.generate("a red apple", num=2, count_macs=True).report.macs
    assert one == two > 0
    assert engine.generate("a red apple").report.macs is None


@pytest.fixture
def engine_of():
    from suite import Engine

    opened = []

    def open_engine(recipe):
        opened.append(Engine.from_recipe({"dtype": "fp32", "guidance": 1.0} | recipe))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()
