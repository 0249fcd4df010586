"""Weights in one file or in several with an index, as the libraries save them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `image` is not installed")

import diffusers

from suite.errors import ConfigError
from suite.network.weights import load_network


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


def masked_model(folder: Path) -> torch.nn.Module:
    """A small network of transformers whose output layer is tied to its embeddings."""
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **ids
    )
    torch.manual_seed(0)
    network = transformers.ModernBertForMaskedLM(config)
    network.save_pretrained(folder)
    return network.eval()


def test_transformers_classes_with_tied_weights_load(tmp_path: Path):
    network, tokens = masked_model(tmp_path), torch.arange(12)[None]
    again = load_network(tmp_path, "cpu", torch.float32)
    assert type(again) is type(network)
    assert again.decoder.weight is again.model.embeddings.tok_embeddings.weight
    assert torch.equal(again(tokens).logits, network(tokens).logits)


def test_rotary_frequencies_stay_exact_in_half_precision(tmp_path: Path):
    network = masked_model(tmp_path)
    again = load_network(tmp_path, "cpu", torch.bfloat16)
    assert again.decoder.weight.dtype is torch.bfloat16
    constants = {n: b for n, b in network.named_buffers() if "inv_freq" in n}
    assert constants
    assert all(torch.equal(b, dict(again.named_buffers())[n]) for n, b in constants.items())


def test_an_untied_missing_weight_is_an_error(tmp_path: Path):
    masked_model(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["head.dense.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of ModernBertForMaskedLM, first head\.dense\.weight"):
        load_network(tmp_path, "cpu", torch.float32)


def test_a_folder_that_names_no_class(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither _class_name"):
        load_network(tmp_path, "cpu", torch.float32)
