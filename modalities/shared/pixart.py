"""How diffusers' PixArt transformer is called: token states and their mask, and no size conditions."""

from __future__ import annotations

from torch import Tensor, nn

from suite.diffusion.denoiser import Cond


def call_pixart(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Output [B, C, H, W] for x [B, C, H, W], the network's own time [B], and `states` and `mask` of the captions."""
    no_size = {"resolution": None, "aspect_ratio": None}
    return module(
        x,
        encoder_hidden_states=cond["states"],
        encoder_attention_mask=cond["mask"],
        timestep=time,
        added_cond_kwargs=no_size,
        return_dict=False,
    )[0]
