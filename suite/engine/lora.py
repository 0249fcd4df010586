"""The network of the present views that VSD needs: low-rank adapters on a copy of the teacher (peft's LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.rng import SampleRng, repeatable
from suite.diffusion.solver import expand
from suite.errors import ConfigError

if TYPE_CHECKING:
    from suite.diffusion.denoiser import Cond, NetworkDenoiser
    from suite.network import Network

SNR_CAP = 5.0
"""Largest weight of the loss (min-SNR, Hang 2023): without it the least noisy times drown the others."""
RANGE = (0.02, 0.98)
"""Times at which the adapters learn."""


@dataclass(frozen=True)
class LoraScore:
    """A `suite.engine.score_distillation.Score`: a teacher's copy whose adapters learn to denoise the present views.

    Wang 2023 (2305.16213, section 3.2). It is asked and taught without guidance; its evaluations are counted like the
    teacher's.
    """

    denoiser: NetworkDenoiser
    optimiser: torch.optim.Optimizer

    def denoise(self, x: Tensor, t: Tensor, cond: Mapping[str, Cond]) -> Tensor:
        """x0 [V, ...] given x at time t, float64 scalar or [V]."""
        return self.denoiser.denoise(x, t, cond["cond"], Call(0, 1, float(t.max()), 0.0))

    def fit(self, x: Tensor, cond: Mapping[str, Cond], rng: SampleRng) -> float:
        """One step on views [V, ...] at a time of its own; returns the loss, min(SNR, 5) |x0_hat - x|^2."""
        low, high = RANGE
        t = low + (high - low) * rng.uniform((1,))[0, 0].double()
        noise = self.denoiser.noise
        alpha, sigma = noise.alpha(t), noise.sigma(t)
        noisy = expand(alpha, x) * x + expand(sigma, x) * rng.normal(x.shape)[0].to(x)
        with torch.enable_grad():
            error = (self.denoise(noisy, t, cond) - x).square().mean()
            loss = error * float(((alpha / sigma) ** 2).clamp(max=SNR_CAP))
            self.optimiser.zero_grad(set_to_none=True)
            with repeatable(x.device):
                loss.backward()
        self.optimiser.step()
        return float(loss.detach())


def lora(network: Network, denoiser: NetworkDenoiser, rank: int = 8, lr: float = 1e-3, seed: int = 0) -> LoraScore:
    """Adapters on every linear layer inside the blocks of `network`, whose module is changed in place.

    `denoiser` is that of the teacher; the new one differs in its module. Raises ConfigError when peft is missing or
    the network has no linear layer in blocks.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("vsd needs peft, which is not installed. Type: pip install peft") from error
    parts = {ref.name for ref in network.blocks("attention", "cross_attention", "temporal_attention", "mlp")}
    targets = [
        name
        for name, layer in network.layers()
        if isinstance(layer, torch.nn.Linear) and any(name.startswith(part + ".") for part in parts)
    ]
    if not targets:
        raise ConfigError("vsd found no linear layers in the network's blocks for its adapters; take sds")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network.module)
    adapters = [p for name, p in module.named_parameters() if "lora_" in name]
    for p in adapters:
        p.data = p.data.float()
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(adapters, lr=lr)
    return LoraScore(replace(denoiser, module=module), optimiser)
