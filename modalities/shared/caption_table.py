"""Captions of a training set on the device that trains: drawn, dropped for guidance, looked up for sample sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.errors import ConfigError
from suite.modalities.shared.captions import Captioned
from suite.modalities.shared.text_encoder import TokenStates


@dataclass(frozen=True)
class CaptionTable:
    """`captions` int64 [N, K] of N samples into `states` float16 [C, L, 384] and `tokens` int64 [C]; caption 0 is the
    null condition."""

    captions: Tensor
    states: Tensor
    tokens: Tensor

    @staticmethod
    def of(data: Captioned, captions: Tensor, length: int, device: torch.device) -> CaptionTable:
        """All captions of `data` at `length` tokens; `captions` are those of each sample."""
        every = torch.arange(len(data.offsets) - 1)
        states = torch.cat([data.states(part, length).states.half() for part in every.split(1024)])
        tokens = (data.offsets[1:] - data.offsets[:-1]).clamp(max=length)
        return CaptionTable(captions.to(device), states.to(device), tokens.to(device))

    def draw(self, samples: Tensor, dropout: float, rng: torch.Generator) -> Tensor:
        """A caption of each of these samples, int64 [B], or with the chance `dropout` the null one."""
        device, batch = samples.device, (len(samples),)
        choice = torch.randint(self.captions.shape[1], batch, device=device, generator=rng)
        dropped = torch.rand(batch, device=device, generator=rng) < dropout
        return self.captions[samples, choice].masked_fill(dropped, 0)

    def conditions(self, captions: Tensor) -> TokenStates:
        """Token states of these captions [B]."""
        position = torch.arange(self.states.shape[1], device=captions.device)
        return TokenStates(self.states[captions].float(), (position < self.tokens[captions][:, None]).float())

    @property
    def null(self) -> TokenStates:
        """The null condition, one row."""
        return self.conditions(torch.zeros(1, dtype=torch.long, device=self.states.device))


def named_captions(texts: Sequence[str], wanted: Sequence[str], count: int) -> Tensor:
    """Indices of the `wanted` captions, or if none is named of `count` spread evenly over all but the null one.

    Raises:
        ConfigError: a caption that the training set has not.
    """
    if not wanted:
        return torch.linspace(1, len(texts) - 1, min(count, len(texts) - 1)).long()
    where = {text: k for k, text in reversed(list(enumerate(texts)))}
    if absent := [text for text in wanted if text not in where]:
        raise ConfigError(f"sheet: the training set has no caption {absent[0]!r}; sheets show captions of the data")
    return torch.tensor([where[text] for text in wanted])
