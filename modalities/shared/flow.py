"""What training a flow model from captions is in every modality: the loss, a quick look at samples, the pairing.

Noise is the flow family, x_t = (1 - t) x0 + t eps, t in [0, 1] with 1 the prior; the network gets 1000 t. It
predicts x0, and its error is weighted as in velocity space: |x0_hat - x0|^2 / max(t, floor)^2, as the velocity is
(x_t - x0) / t.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suite.diffusion.noise import Flow
from suite.errors import ConfigError
from suite.host.discovery import installed
from suite.host.manager import Manager, load
from suite.modalities.shared.text_encoder import TokenStates
from suite.recipe import from_options
from suite.run import Run

Draw = Callable[[torch.Generator], tuple[Tensor, TokenStates]]
Predict = Callable[[nn.Module, Tensor, Tensor, TokenStates], Tensor]


def predict(network: nn.Module, x: Tensor, t: Tensor, text: TokenStates) -> Tensor:
    """x0_hat of x_t [B, C, H, W] at times t [B], by a PixArt transformer or a conditional U-Net, in float32."""
    extra: dict[str, Any] = {}
    if "PixArt" in type(getattr(network, "_orig_mod", network)).__name__:
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return network(
        x, timestep=1000 * t, encoder_hidden_states=text.states, encoder_attention_mask=text.mask, **extra
    ).sample.float()


Times = Callable[[int, torch.Generator], Tensor]


def drawn_times(schedule: str, mean: float, std: float) -> Times:
    """(batch, generator) -> times [B], float32 on the generator's device.

    Those of a schedule plugin that a training file names, such as `density:kind=u-shaped`; sigmoid(N(mean, std^2))
    where it names none.

    Raises:
        ConfigError: there is no such schedule, or it does not take the options.
    """
    if not schedule:
        return lambda batch, rng: torch.sigmoid(mean + std * torch.randn(batch, device=rng.device, generator=rng))
    recipe = from_options(schedule=schedule)
    made = Manager(load(recipe, installed(), "training")).schedule(Flow(), Run("training", "flow"))
    return lambda batch, rng: made.training_times(batch, rng).float()


def flow_loss(
    draw: Draw,
    mean: float,
    std: float,
    floor: float,
    immiscible: bool = False,
    predict: Predict = predict,
    schedule: str = "",
) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(network, generator)` of one batch, for the training loop; its times are those of `drawn_times`.

    `draw(generator)` gives x0 [B, ...] float32 and the states of its captions.
    """
    times = drawn_times(schedule, mean, std)

    def loss(network: nn.Module, rng: torch.Generator) -> Tensor:
        x0, text = draw(rng)
        t = times(len(x0), rng).to(x0.device)
        noise = torch.randn(x0.shape, device=x0.device, generator=rng)
        if immiscible:
            noise = noise[assign(x0, noise)]
        at = t.view(-1, *[1] * (x0.ndim - 1))
        error = predict(network, (1 - at) * x0 + at * noise, t, text) - x0
        return (error / at.clamp(min=floor)).square().mean()

    return loss


def assign(x0: Tensor, noise: Tensor) -> Tensor:
    """The permutation [B] of `noise` that makes the sum of squared distances to `x0` smallest, exactly.

    Immiscible diffusion (Li et al., 2024): every sample is paired with noise that is near it. Norms do not depend
    on the pairing, so the inner products decide.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("immiscible: true needs scipy, which is not installed. Type: pip install scipy") from None
    cost = -(x0.flatten(1).double() @ noise.flatten(1).double().T)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=noise.device)


def sample(
    network: nn.Module,
    text: TokenStates,
    shape: Sequence[int],
    null: TokenStates,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    predict: Predict = predict,
) -> Tensor:
    """x0 [N, *shape] clipped to [-1, 1], by Euler steps of the flow with classifier-free guidance.

    Only for looking at a run in progress; the suite's engine has the solvers.
    """
    count, device = len(text), text.states.device
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    both = TokenStates(
        torch.cat([text.states, null.states.expand(count, -1, -1)]), torch.cat([text.mask, null.mask.expand(count, -1)])
    )
    times = torch.linspace(1, 0, steps + 1).tolist()
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            at = torch.full((2 * count,), t, device=device)
            conditional, free = predict(network, torch.cat([x, x]), at, both).chunk(2)
            x0 = free + guidance * (conditional - free)
            x = x0 + (s / t) * (x - x0)
    return x.clamp(-1, 1)
