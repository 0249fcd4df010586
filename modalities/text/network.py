"""How both families call a bidirectional transformer of transformers: ModernBERT's class, or BERT's.

The sequence is [prompt | text]. The prompt's tokens are embedded by the network's own table, never change, and are
hidden from attention where they are padding. The text part is
    masked       tokens, the mask among them, embedded by the same table; time is not told (the masks tell it);
    continuous   embeddings with noise: see `embedding`.
The network's language-model head is applied to the text part alone.

ModernBERT is trained from nothing. BERT's class starts from the sentence encoder that the suite depends on (a masked
language model once; DiffusionBERT, He 2023): it tells the prompt from the text by its two segments, and scores the
first `outputs` tokens of its configuration only, those that texts have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite.modalities.text.vocabulary import ENCODER, PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping


def build(model: Mapping[str, Any], vocabulary: int, outputs: int) -> nn.Module:
    """A network to train: `model` has the arguments of `ModernBertConfig`, or `start: minilm` and those of BertConfig.

    Attention is full in all layers. The encoder's weights are not copied here; see `from_encoder`.
    """
    from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

    special = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    if model.get("start") == ENCODER:
        theirs = _encoder_config()
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
        own = {k: v for k, v in model.items() if k != "start"}
        return BertForMaskedLM(
            BertConfig(**{**theirs, **settings, **own, "vocab_size": vocabulary, "outputs": outputs})
        )
    layers = int(model.get("num_hidden_layers", 6))
    settings = {"layer_types": ["full_attention"] * layers, **model, "vocab_size": vocabulary}
    return ModernBertForMaskedLM(ModernBertConfig(**{**settings, **special}))


def _encoder_config() -> dict[str, Any]:
    from transformers import BertConfig

    from suite.modalities.shared.words import encoder_folder

    theirs = BertConfig.from_pretrained(encoder_folder()).to_dict()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    return {name: theirs[name] for name in (*names, "layer_norm_eps", "type_vocab_size", "max_position_embeddings")}


def from_encoder(network: Any, table: Tensor) -> None:
    """Give a network of BERT's class the sentence encoder's weights, and the embeddings `table` [V, H] of its tokens.

    Positions are cut to the network's, the text's segment starts as the prompt's, and the head passes states through,
    so that the first scores are products with the embeddings. The table is not trained, nor saved.
    """
    from suite.modalities.shared.words import encoder_folder
    from suite.modalities.text.pieces import EMBEDDINGS
    from suite.observe.finite import load_finite

    theirs = {f"bert.{name}": value for name, value in load_finite(encoder_folder() / "model.safetensors").items()}
    own, head = network.state_dict(), network.cls.predictions
    for name in own.keys() & theirs.keys() - {EMBEDDINGS}:
        theirs[name] = theirs[name][: len(own[name])]
    segment = "bert.embeddings.token_type_embeddings.weight"
    theirs[segment] = theirs[segment][:1].repeat(len(own[segment]), 1)
    network.load_state_dict({n: theirs[n] for n in own.keys() & theirs.keys() - {EMBEDDINGS}}, strict=False)
    with torch.no_grad():
        network.get_input_embeddings().weight.copy_(table)
        head.transform.dense.weight.copy_(torch.eye(table.shape[1]))
        for value in (head.transform.dense.bias, head.transform.LayerNorm.bias, head.bias):
            value.zero_()
    network.get_input_embeddings().weight.requires_grad_(False)


def outputs_of(network: Any) -> int:
    """How many tokens the network scores: the first ones of its vocabulary."""
    return int(getattr(network.config, "outputs", network.config.vocab_size))


def embed(network: Any, tokens: Tensor) -> Tensor:
    """The network's own embeddings [B, N, H] of tokens [B, N]."""
    return network.get_input_embeddings()(tokens)


def text_logits(network: Any, prompt: Tensor, prompt_mask: Tensor, text: Tensor) -> Tensor:
    """Logits [B, L, V] of the text part.

    Args:
        prompt: tokens [B, P]; prompt_mask: bool [B, P], true where a token is.
        text: tokens [B, L], or embeddings [B, L, H].
    """
    if text.is_floating_point():
        text = text.to(network.get_input_embeddings().weight.dtype)
    else:
        text = embed(network, text)
    sequence = torch.cat([embed(network, prompt), text], dim=1)
    visible = torch.cat([prompt_mask, prompt_mask.new_ones(text.shape[:2])], dim=1)[:, None, None, :]
    places = torch.arange(sequence.shape[1], device=sequence.device)
    # Training may cut prompts that leave places empty: the text's first place is always behind the longest prompt.
    places = torch.where(places < prompt.shape[1], places, places + PROMPT - prompt.shape[1])
    hidden = _hidden(network, sequence, visible, places[None])
    return scores(network, hidden[:, prompt.shape[1] :])


def part_logits(network: Any, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits [B, A, V] of a part of the text: tokens [B, A] at `places` [B, A] of the sequence [prompt | text].

    The sequence holds these places alone. What they should see of the others (keys and values that were computed
    before) is brought by whoever asks; see `suite.network.Layout.parts`.
    """
    # Of one row, so that it fits every mask of the others that may take its place.
    visible = places.new_ones(1, 1, 1, places.shape[1], dtype=torch.bool)
    return scores(network, _hidden(network, embed(network, tokens), visible, places))


def _hidden(network: Any, sequence: Tensor, visible: Tensor, places: Tensor) -> Tensor:
    """States [B, N, H] of a sequence [B, N, H]; `visible` bool [B or 1, 1, 1, N], `places` [B or 1, N]."""
    if hasattr(network, "bert"):
        given = {"position_ids": places, "token_type_ids": (places >= PROMPT).long().expand(sequence.shape[:2])}
        # The class would make a mask of its own from a plain one; one of four axes is taken as it is.
        return network.bert(inputs_embeds=sequence, attention_mask=visible, **given).last_hidden_state
    # A mapping is taken as it is; from a plain mask the class would make one of its own for every kind of layer.
    masks = dict.fromkeys(("full_attention", "sliding_attention"), visible)
    return network.model(inputs_embeds=sequence, attention_mask=masks, position_ids=places).last_hidden_state


def scores(network: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of states [..., H]: the head, for the tokens that the network scores."""
    if not hasattr(network, "bert"):
        return network.decoder(network.head(hidden))
    head = network.cls.predictions
    count = outputs_of(network)
    return functional.linear(head.transform(hidden), head.decoder.weight[:count], head.bias[:count])
