"""Weights in one file or in several with an index, as the libraries save them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `image` is not installed")

import diffusers

from suite.errors import ConfigError
from suite.weights import load_network


@pytest.fixture
def split(tmp_path: Path):
    """A small network, saved in several files."""
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=4, in_channels=3, out_channels=3, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, caption_channels=16, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    network.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return network, tmp_path


def test_parts_make_the_whole(split):
    network, folder = split
    again = load_network(folder, "cpu", torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())


def test_a_missing_and_a_cut_part_are_errors_that_name_it(split):
    _, folder = split
    part = sorted(folder.glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:99])
    with pytest.raises(ConfigError, match=f"{part.name} cannot be read"):
        load_network(folder, "cpu", torch.float32)
    part.unlink()
    with pytest.raises(ConfigError, match=f"{part.name} cannot be read"):
        load_network(folder, "cpu", torch.float32)


def test_a_damaged_index_is_an_error(split):
    _, folder = split
    index = next(folder.glob("*.index.json"))
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ConfigError, match="is not an index of weights"):
        load_network(folder, "cpu", torch.float32)
