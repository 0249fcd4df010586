"""How both families call a bidirectional transformer of transformers (ModernBERT class).

The sequence is [prompt | text]. The prompt's tokens are embedded by the network's own table, never change, and are
hidden from attention where they are padding. The text part is
    masked       tokens, the mask among them, embedded by the same table; time is not told (the masks tell it);
    continuous   embeddings with noise: see `embedding`.
The network's language-model head is applied to the text part alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASS = "ModernBertForMaskedLM"


def build(model: dict[str, Any], vocabulary: int) -> nn.Module:
    """A fresh network; `model` has the arguments of `ModernBertConfig`. Attention is full in all layers."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    layers = int(model.get("num_hidden_layers", 6))
    settings = {"layer_types": ["full_attention"] * layers, **model, "vocab_size": vocabulary}
    special = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertForMaskedLM(ModernBertConfig(**{**settings, **special}))


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
    # A mapping is taken as it is; from a plain mask the class would make one of its own for every kind of layer.
    masks = dict.fromkeys(("full_attention", "sliding_attention"), visible)
    hidden = network.model(inputs_embeds=sequence, attention_mask=masks).last_hidden_state
    return network.decoder(network.head(hidden[:, prompt.shape[1] :]))


def part_logits(network: Any, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits [B, A, V] of a part of the text: tokens [B, A] at `places` [B, A] of the sequence [prompt | text].

    The sequence holds these places alone. What they should see of the others (keys and values that were computed
    before) is brought by whoever asks; see `suite.network.Layout.parts`.
    """
    # Of one row, so that it fits every mask of the others that may take its place.
    visible = places.new_ones(1, 1, 1, places.shape[1], dtype=torch.bool)
    masks = dict.fromkeys(("full_attention", "sliding_attention"), visible)
    body = network.model(inputs_embeds=embed(network, tokens), attention_mask=masks, position_ids=places)
    return network.decoder(network.head(body.last_hidden_state))
