"""Losses of both families, the model folder, and resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from suite import Engine
from suite.diffusion.noise import Sqrt
from suite.errors import ConfigError
from suite.modalities.text import embedding, training
from suite.modalities.text.config import read
from suite.modalities.text.data import load
from suite.modalities.text.training import Writer, continuous_loss, make_batches, masked_loss, padded, silent, weights
from suite.modalities.text.vocabulary import MASK, NONE, PAD
from suite.training.loop import generator_for

CPU = torch.device("cpu")


class Even(nn.Module):
    """Knows nothing: every token is as likely; records what it was given."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def forward(self, prompt: torch.Tensor, mask: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.seen.append(text)
        return torch.zeros(*text.shape[:2], self.vocabulary)


@pytest.fixture(scope="module")
def masked(data: Path, configurations):
    texts, config = load(data), read(configurations["masked"])
    return texts, config, make_batches(texts, config, CPU)


def test_loss_of_no_knowledge_is_the_logarithm_of_the_vocabulary(masked) -> None:
    """1/t makes the expected weight of every place 1, so the bound is ln V."""
    texts, config, batches = masked
    network, loss = Even(len(texts.vectors)), masked_loss(batches, config)
    values = torch.stack([loss(network, generator_for(0, step, CPU)) for step in range(400)])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - math.log(600)) < 4 * error


def test_masked_inputs_keep_the_other_tokens(masked) -> None:
    texts, config, batches = masked
    network = Even(len(texts.vectors))
    masked_loss(batches, config)(network, generator_for(0, 0, CPU))
    (seen,) = network.seen
    assert seen.shape[1] in (16, 24) and (seen == MASK).any() and (seen != MASK).any()


def test_held_out_and_too_long_texts_are_never_drawn(masked) -> None:
    texts, _, batches = masked
    for canvas, chances in batches.chances.items():
        assert (chances[texts.held_out] == 0).all()
        assert (chances[texts.lengths >= canvas] == 0).all()
        assert chances.sum() > 0


def test_prompts_belong_to_their_texts(masked) -> None:
    texts, _, batches = masked
    text, prompt, mask = batches.draw(24, 64, 0.0, generator_for(0, 1, CPU))
    rows = padded(texts.tokens, texts.offsets, 64)[:, :24]
    for row, tokens, there in zip(text, prompt, mask, strict=True):
        index = int((rows == row).all(1).nonzero()[0, 0])
        mine = [texts.prompt_tokens[texts.prompt_offsets[k] : texts.prompt_offsets[k + 1]].tolist()[:12]
                for k in (texts.prompt_texts == index).nonzero()[:, 0]]  # fmt: skip
        assert tokens[there].tolist() in mine


def test_dropped_prompts_say_nothing() -> None:
    prompt, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[True, True, False], [True, True, True]])
    tokens, there = silent(prompt, mask, torch.tensor([True, False]))
    assert tokens.tolist() == [[NONE, PAD, PAD], [7, 8, 9]]
    assert there.tolist() == [[True, False, False], [True, True, True]]


def test_the_end_counts_in_full_and_the_padding_after_it_less() -> None:
    text = torch.tensor([[5, 6, PAD, PAD], [PAD, PAD, PAD, PAD], [5, 6, 7, 8]])
    rounded = [[round(v, 4) for v in row] for row in weights(text, 0.3).tolist()]
    assert rounded == [[1, 1, 1, 0.3], [1, 0.3, 0.3, 0.3], [1, 1, 1, 1]]


def test_continuous_loss_feeds_back_its_estimate(data: Path, configurations) -> None:
    texts = load(data)
    config = read(configurations["continuous"], ["self_conditioning=1.0"])
    writer = Writer(config, texts)
    loss = continuous_loss(make_batches(texts, config, CPU), config)
    seen = []
    writer.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    loss(writer, generator_for(0, 0, CPU)).backward()
    first, second = seen
    width = config.width
    assert (first[..., width : 2 * width] == 0).all()
    assert second[..., width : 2 * width].abs().max() > 0
    assert torch.equal(first[..., :width], second[..., :width]), "the same noisy text is shown twice"
    assert writer.table is not None and writer.table.grad is not None and writer.table.grad.abs().max() > 0


def test_network_input_has_unit_variance_and_tells_the_time() -> None:
    network = SimpleNamespace(config=SimpleNamespace(hidden_size=32))
    rng = torch.Generator().manual_seed(0)
    table = embedding.normalised(torch.randn(50, 8, generator=rng))
    e = table[torch.randint(50, (64, 16), generator=rng)]
    for time in (0.05, 0.5, 0.99):
        t = torch.full((64,), time)
        alpha, sigma = float(Sqrt().alpha(time)), float(Sqrt().sigma(time))
        x = alpha * e + sigma * torch.randn(e.shape, generator=rng)
        shown = embedding.network_input(x, torch.zeros_like(x), Sqrt(), t, network)
        assert shown.shape == (64, 16, 32) and shown.isfinite().all()
        assert abs(float(shown[..., :8].std()) - 1) < 0.05
    both = embedding.network_input(e[:2] * 0, e[:2] * 0, Sqrt(), torch.tensor([0.2, 0.21]), network)
    assert (both[0, 0, 16:] - both[1, 0, 16:]).abs().max() > 1e-3
    ends = embedding.network_input(e[:2], e[:2], Sqrt(), torch.tensor([0.0, 1.0]), network)
    assert ends.isfinite().all()


def test_start_puts_like_words_near_each_other() -> None:
    rng = torch.Generator().manual_seed(0)
    centre = torch.randn(2, 40, generator=rng)
    vectors = centre.repeat_interleave(20, 0) + 0.3 * torch.randn(40, 40, generator=rng)
    table = embedding.start(vectors, 8)[3:]
    cosine = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    assert cosine[:17, :17].mean() > 0.1 + cosine[:17, 17:].mean()
    assert torch.allclose(table.square().mean(1), torch.ones(37))


@pytest.mark.parametrize("family", ["masked", "continuous", "encoder"])
def test_the_model_folder(models: dict[str, Path], family: str) -> None:
    folder = models[family]
    assert json.loads((folder / "suite.json").read_text())["family"] == family.replace("encoder", "masked")
    kind = "BertForMaskedLM" if family == "encoder" else "ModernBertForMaskedLM"
    assert json.loads((folder / "transformer" / "config.json").read_text())["architectures"] == [kind]
    assert (folder / embedding.FILE).is_file() == (family == "continuous")
    assert (folder / "loss.csv").read_text().startswith("step,loss")
    assert (folder.parent / "samples-000002.txt").read_text().startswith("disaster (noun) -> ")


def test_transformers_opens_the_folder(models: dict[str, Path]) -> None:
    from transformers import AutoModelForMaskedLM

    from suite.modalities.shared.text_encoder import quiet

    with quiet():
        network = AutoModelForMaskedLM.from_pretrained(models["masked"] / "transformer", local_files_only=True)
    assert type(network).__name__ == "ModernBertForMaskedLM"
    assert network(torch.arange(8)[None]).logits.shape == (1, 8, 600)


def test_a_model_of_the_encoder_keeps_its_embeddings_in_the_package(models: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    from suite.modalities.text import pieces

    folder = models["encoder"]
    saved = load_file(folder / "transformer" / "model.safetensors")
    assert not any("word_embeddings" in name or "decoder" in name for name in saved)
    facts = json.loads((folder / "suite.json").read_text())
    with Engine.from_recipe("reference", modality="text", model=str(folder)) as engine:
        network = engine.modality.network.module
        table = pieces.table(Tokenizer.from_file(str(folder / "tokenizer.json")))
        assert torch.equal(network.bert.embeddings.word_embeddings.weight, table)
        logits = network.cls.predictions.decoder.weight
        assert logits.data_ptr() == network.bert.embeddings.word_embeddings.weight.data_ptr()
    assert 100 < facts["outputs"] < len(table) == 30522


def test_an_untrained_model_of_the_encoder_gives_its_states(pieces: Path, configurations) -> None:
    """With the head passing states on, prompt and text together have the encoder's own states, bit for bit in shape."""
    from suite.modalities.shared.text_encoder import minilm
    from suite.modalities.text.network import _hidden, embed, text_logits

    data = load(pieces)
    config = read(configurations["encoder"], ["model.num_hidden_layers=6"])
    network = Writer(config, data).network.eval()
    tokenizer = Tokenizer.from_str(data.tokenizer)
    ours = torch.tensor([tokenizer.encode("a dog runs").ids])
    theirs, encoder = minilm()
    with torch.no_grad():
        wanted = encoder(**theirs("a dog runs", return_tensors="pt")).last_hidden_state
        visible = torch.ones(1, 1, 1, ours.shape[1], dtype=torch.bool)
        found = _hidden(network, embed(network, ours), visible, torch.arange(ours.shape[1])[None])
        assert torch.allclose(found, wanted, atol=1e-5)
        prompt, text = torch.full((2, 12), 0), torch.full((2, 5), MASK)
        prompt[:, :5] = ours
        mask = torch.arange(12).expand(2, -1) < 5
        short, long = text_logits(network, prompt[:, :6], mask[:, :6], text), text_logits(network, prompt, mask, text)
    assert torch.allclose(short, long, atol=1e-4), "a cut prompt leaves the text where it was"
    assert short.shape == (2, 5, data.outputs)


def test_data_of_the_other_kind_are_refused(data: Path, pieces: Path, configurations, tmp_path: Path) -> None:
    for family, file in (("encoder", data), ("masked", pieces)):
        with pytest.raises(ConfigError, match="prepare it again"):
            training.train(configurations[family], file, tmp_path / family)


def test_the_mean_weighs_every_masked_place_alike(pieces: Path, configurations) -> None:
    texts, config = load(pieces), read(configurations["encoder"])
    batches = make_batches(texts, config, CPU)
    value = masked_loss(batches, config)(Even(texts.outputs), generator_for(0, 0, CPU))
    assert float(value) == pytest.approx(math.log(texts.outputs), rel=1e-5), "without variance, unlike the bound"
    only = batches.chances[16] > 0
    assert set(texts.kinds[only].tolist()) == {0}, "shares_at: definitions alone on the short canvas"
    assert set(texts.kinds[batches.chances[24] > 0].tolist()) > {0}


def test_resume_continues_tied_weights(data: Path, configurations, tmp_path: Path) -> None:
    out = tmp_path / "run"
    training.train(configurations["masked"], data, out)
    training.train(configurations["masked"], data, out, resume=True, overrides=["train.steps=3"])
    rows = (out / "loss.csv").read_text().split()
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]


@pytest.mark.parametrize(("change", "message"), [
    ("family=other", "masked or continuous"),
    ("weighting=other", "bound or mean"),
    ("shares_at={99: {definition: 1}}", "no canvases"),
    ("canvas_shares={}", "same lengths"),
    ("canvases={16: 4, 99: 2}", "same lengths"),
    ("shares={}", "parts of 0 or more"),
    ("time_floor=0", "time_floor"),
    ("trian.steps=3", "did you mean train"),
])  # fmt: skip
def test_wrong_recipes(configurations, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(configurations["masked"], [change])


@pytest.mark.parametrize("name", ["text-masked", "text-continuous", "text-masked-gpu", "text-continuous-gpu"])
def test_shipped_recipes_are_read(name: str) -> None:
    from suite.recipe import CONFIGS

    config = read(CONFIGS / "training" / f"{name}.yaml")
    assert (config.train.optimizer, config.family) == (
        ("adamw", "masked") if "masked" in name else ("muon", "continuous")
    )
