"""What a network's output means: how it becomes an estimate of x0, in diffusers' words.

With x = alpha x0 + sigma eps each kind is affine in (x, output), so every solver sees the same x0.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suite.diffusion.coefficients import of_times
from suite.errors import ConfigError

if TYPE_CHECKING:
    from suite.diffusion.coefficients import Coefficient
    from suite.diffusion.noise import NoiseSchedule


class Prediction(StrEnum):
    """The five kinds of output."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V = "v_prediction"
    FLOW = "flow_prediction"
    LOGITS = "logits"

    @classmethod
    def named(cls, name: str) -> Prediction:
        """The kind called `name`; a ConfigError lists the five."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(f"unknown prediction {name!r}; expected one of {', '.join(cls)}") from None


def coefficients(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with x0 = a x + b output, for the four continuous kinds.

    v = alpha eps - sigma x0 (Salimans & Ho 2022); flow = eps - x0 (Lipman 2022). `epsilon` is undefined
    where alpha = 0: its coefficients are infinite there.
    """
    if kind is Prediction.EPSILON:
        return 1 / alpha, -sigma / alpha
    if kind is Prediction.SAMPLE:
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind is Prediction.V:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if kind is Prediction.FLOW:
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ConfigError(f"prediction {kind} is not continuous; expected epsilon, sample, v_prediction or flow_prediction")


def to_x0(kind: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x0, in x's dtype; alpha and sigma broadcast against x."""
    if kind is Prediction.SAMPLE:
        return output.to(x.dtype)
    a, b = coefficients(kind, alpha, sigma)
    return a.to(x) * x + b.to(x) * output.to(x.dtype)


@cache
def x0_weights(kind: Prediction) -> Callable[..., tuple[Coefficient, ...]]:
    """(noise, t) -> the coefficients of x and of the output in x0; looked up at times that all samples share."""

    @of_times
    def weights(noise: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        return coefficients(kind, noise.alpha(t), noise.sigma(t))

    return weights


def from_x0(kind: Prediction, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The output that a network of this kind would have given: the inverse of `to_x0`, and the training target."""
    eps = (x - alpha.to(x) * x0) / sigma.to(x)
    if kind is Prediction.EPSILON:
        return eps
    if kind is Prediction.SAMPLE:
        return x0
    if kind is Prediction.V:
        return alpha.to(x) * eps - sigma.to(x) * x0
    if kind is Prediction.FLOW:
        return eps - x0
    raise ConfigError(f"prediction {kind} is not continuous")


def tokens_to_x0(logits: Tensor, tokens: Tensor, mask_token: int) -> Tensor:
    """p(x0 given x_t) for masked tokens (MDLM's SUBS): the mask is never predicted, seen tokens are kept.

    Args:
        logits: [B, L, V]; tokens: [B, L] with `mask_token` where unknown.

    Returns:
        [B, L, V] probabilities; one-hot at every token that is already known.
    """
    logits = logits.clone()
    logits[..., mask_token] = -torch.inf
    probabilities = logits.softmax(-1)
    known = torch.nn.functional.one_hot(tokens, logits.shape[-1]).to(probabilities)
    return torch.where((tokens == mask_token)[..., None], probabilities, known)
