"""`Denoiser`: the one interface between what predicts and what steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from suite.call import Call, activate
from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.prediction import Prediction, tokens_to_x0, x0_weights
from suite.diffusion.solver import combine

#: Conditioning of one branch: named tensors whose first axis is the batch (or None).
Cond = Mapping[str, Any]


class Denoiser(Protocol):
    """x0 = E[x0 given x_t], or p(x0 given x_t) for tokens."""

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        """Args: x [B, ...]; t float64 scalar, [B] or [B, groups]; cond of the branches in `call`, B rows.

        Where `suite.network.Layout.parts` says so, x may hold some places of tokens only, [B, A], with the numbers
        of these places as `positions` [B, A] in cond; the answer is then for them, [B, A, V].
        """
        ...


#: How a modality calls its network: (module, x, time input [B], cond) -> output.
Forward = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]


@dataclass
class Counter:
    """Evaluations counted by the engine: `nfe` in rows-per-sample (a batched CFG pair is 2), `depth` in calls."""

    nfe: float = 0
    depth: int = 0

    def add(self, branches: float, calls: int = 1) -> None:
        """Record `calls` sequential evaluations of `branches` branches each, or of a share of their rows."""
        self.nfe += branches * calls
        self.depth += calls

    def clear(self) -> None:
        """Count from 0 again."""
        self.nfe, self.depth = 0, 0


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network with its prediction kind, as a Denoiser; every evaluation is counted here and nowhere else."""

    module: nn.Module
    forward: Forward
    noise: NoiseSchedule
    prediction: Prediction
    dtype: torch.dtype
    counter: Counter
    mask_token: int | None = None

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        self.counter.add(len(call.branches) * call.share)
        time = self.noise.time_input(t).to(device=x.device, dtype=torch.float32)
        time = time.expand(x.shape[0]) if time.ndim == 0 else time
        with activate(call, x.shape[0]):
            state = x if self.noise.discrete else x.to(self.dtype)
            output = self.forward(self.module, state, time, cond)
        if self.prediction is Prediction.LOGITS:
            if self.mask_token is None:  # uniform noise: any token may be wrong, and none is a mask
                return output.float().softmax(-1)
            return tokens_to_x0(output.float(), x, self.mask_token)
        if self.prediction is Prediction.SAMPLE:  # needs no coefficients
            return output.to(x.dtype)
        return combine(x0_weights(self.prediction)(self.noise, t), (x, output.to(x.dtype)))


def concatenate(conds: list[Cond]) -> Cond:
    """Rows of several conditionings one after the other; all must have the same names and shapes."""
    first = conds[0]
    return {
        name: torch.cat([c[name] for c in conds]) if isinstance(value, Tensor) else value
        for name, value in first.items()
    }


def chosen(cond: Cond, index: Tensor) -> Cond:
    """Some rows of every tensor of a conditioning, by their numbers."""
    return {n: v[index] if isinstance(v, Tensor) else v for n, v in cond.items()}


def rows(cond: Cond, start: int, stop: int) -> Cond:
    """Rows start:stop of every tensor of a conditioning."""
    return {n: v[start:stop] if isinstance(v, Tensor) else v for n, v in cond.items()}
