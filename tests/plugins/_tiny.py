"""Tiny random networks of the library's own classes, and a driver that generates with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from suite.call import Call
from suite.diffusion.denoiser import Cond, Counter, Denoiser, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Flow
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.network import Network
from suite.plugin import Plugin
from suite.plugins.solvers.ddim import DDIM
from suite.plugins.solvers.heun import Heun
from suite.run import Run
from suite.testing.tiny import diffusers_unet
from suite.wrap import Wrap

WORDS, TEXT = 5, 12
SOLVERS = {"ddim": DDIM(), "heun": Heun()}


@dataclass(frozen=True)
class Case:
    """A network: how it is made, how it is called, and the shape of one sample."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
    shape: tuple[int, ...]


def _pixart() -> nn.Module:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )


def _call_pixart(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    extra = {"resolution": None, "aspect_ratio": None}
    return module(x, cond["text"], timestep=time, added_cond_kwargs=extra, return_dict=False)[0]


def _dit() -> nn.Module:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _call_dit(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, time, class_labels=cond["label"], return_dict=False)[0]


def _sd3(**more: Any) -> nn.Module:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=16,
        **more,
    )


def _call_sd3(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, cond["text"], cond["pooled"], time, return_dict=False)[0]


def _flux() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )


def _call_flux(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # Flux multiplies the time by 1000 itself.
    ids = torch.arange(x.shape[1])[:, None] * torch.tensor([[0, 1, 2]])
    words = torch.zeros(WORDS, 3)
    return module(x, cond["text"], cond["pooled"], time / 1000, ids.float(), words, return_dict=False)[0]


def _unet(**more: Any) -> nn.Module:
    return diffusers_unet(**{"block_out_channels": (8, 16), "cross_attention_dim": TEXT, **more})


def _call_unet(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, time, cond["text"], return_dict=False)[0]


def _wan() -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def _call_wan(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, time, cond["text"], return_dict=False)[0]


def _cogvideox() -> nn.Module:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=WORDS,
    )


def _call_cogvideox(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, cond["text"], time, return_dict=False)[0]


def _stable_audio() -> nn.Module:
    from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=TEXT,
        cross_attention_input_dim=TEXT,
        time_proj_dim=8,
        global_states_input_dim=10,
    )


def _call_stable_audio(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    angles = torch.arange(x.shape[-1] + 1.0)[:, None] * torch.tensor([1.0, 0.1])
    table = torch.cat([angles, angles], -1)
    states = cond["pooled"][:, None]
    return module(x, time, cond["text"], states, (table.cos(), table.sin()), return_dict=False)[0]


CASES = {
    "pixart": Case(_pixart, _call_pixart, (4, 8, 8)),
    "dit": Case(_dit, _call_dit, (4, 8, 8)),
    "sd3": Case(_sd3, _call_sd3, (4, 8, 8)),
    "sd3.5": Case(lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), _call_sd3, (4, 8, 8)),
    "flux": Case(_flux, _call_flux, (16, 4)),
    "unet": Case(_unet, _call_unet, (4, 8, 8)),
    "wan": Case(_wan, _call_wan, (4, 2, 8, 8)),
    "cogvideox": Case(_cogvideox, _call_cogvideox, (2, 4, 8, 8)),
    "stable-audio": Case(_stable_audio, _call_stable_audio, (4, 16)),
}


def _unet_deep() -> nn.Module:
    plain, cross = "DownBlock2D", "CrossAttnDownBlock2D"
    return _unet(
        block_out_channels=(8, 16, 16),
        down_block_types=(cross, cross, plain),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
    )


def _unet_bare() -> nn.Module:
    return _unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        mid_block_type=None,
        layers_per_block=1,
    )


def _unet_motion() -> nn.Module:
    from diffusers.models.unets.unet_motion_model import UNetMotionModel

    return UNetMotionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
    )


def _latte() -> nn.Module:
    from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT,
        cross_attention_dim=16,
        video_length=3,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )


def _call_latte(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return module(x, encoder_hidden_states=cond["text"], timestep=time, return_dict=False)[0]


def _call_motion(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # The class wants the text once a frame.
    return module(x, time, cond["text"].repeat_interleave(x.shape[2], 0), return_dict=False)[0]


def _masked_lm() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=0,
            layer_types=["full_attention"] * 3,
            **ends,
        )
    )


def _call_masked_lm(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    # Scores of 16 tokens stand for as many channels. What it knows of the time and the text stands before the rest.
    before = torch.cat([torch.sin(time[:, None, None] / 100).expand(-1, 1, x.shape[-1]), cond["text"].mean((1, 2))[
        :, None, None].expand(-1, 1, x.shape[-1])], 1)  # fmt: skip
    return module(inputs_embeds=torch.cat([before, x], 1)).logits[:, before.shape[1] :]


#: Further classes, for what holds of all of them (see test_every_cache.py).
MORE = {
    "unet-deep": Case(_unet_deep, _call_unet, (4, 8, 8)),
    "unet-bare": Case(_unet_bare, _call_unet, (4, 8, 8)),
    "unet-motion": Case(_unet_motion, _call_motion, (4, 3, 8, 8)),
    "latte": Case(_latte, _call_latte, (4, 3, 8, 8)),
    "masked-lm": Case(_masked_lm, _call_masked_lm, (6, 16)),
}
EVERY = {**CASES, **MORE}


@cache
def module_of(name: str) -> nn.Module:
    """The network, made once: whoever patches it puts it back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = EVERY[name].make().eval().requires_grad_(False)
        for parameter in module.parameters():
            # Zero-initialised gates and outputs would hide what a cache does.
            if not parameter.any():
                parameter.normal_(std=0.02)
    return module


def conditioning(seeds: Sequence[int]) -> Cond:
    """For every network; a row depends on its seed only."""
    rng = SampleRng([1000 + s for s in seeds])
    return {
        "text": rng.normal((WORDS, TEXT)),
        "pooled": rng.normal((10,)),
        "label": torch.tensor([s % 10 for s in seeds]),
    }


@dataclass(frozen=True)
class Setup:
    """One network and the options of a run; `generate` runs it.

    `clock` scales the time that the network sees: an untrained one answers to every frequency of its time
    embedding, and at 1000 t a step of 1/16 is longer than the period of most.
    """

    name: str
    steps: int = 8
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    batched: bool = True
    solver: str = "ddim"
    negative: int = 900
    clock: float = 1.0

    @property
    def module(self) -> nn.Module:
        return module_of(self.name)

    @property
    def network(self) -> Network:
        return Network(self.module)

    def run(self, seeds: Sequence[int]) -> Run:
        return Run("image", self.name, steps=self.steps, batch=len(seeds), seeds=tuple(seeds), guidance=self.guidance)

    def denoiser(self, wraps: Sequence[Wrap] = (), blind: bool = False, counter: Counter | None = None) -> Denoiser:
        """The network as a denoiser; `blind` shows it the same x and t always."""
        call = EVERY[self.name].call

        def forward(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            if blind:
                x, time = torch.ones_like(x), torch.full_like(time, 500)
            return call(module, x, time * self.clock, cond)

        counter = counter or Counter()
        out: Denoiser = NetworkDenoiser(self.module, forward, Flow(), Prediction.FLOW, torch.float32, counter)
        for wrap in wraps:
            out = wrap.denoiser(out) if wrap.denoiser else out
        return out

    @torch.inference_mode()
    def generate(
        self,
        seeds: Sequence[int] = (0,),
        wraps: Sequence[Wrap] = (),
        blind: bool = False,
        counter: Counter | None = None,
    ) -> Tensor:
        """x0 for these seeds on an even grid; the wraps' networks are installed already (see `applied`)."""
        noise, run, rng = Flow(), self.run(seeds), SampleRng(seeds)
        cond: Mapping[str, Cond] = {
            "cond": conditioning(seeds),
            "uncond": conditioning([self.negative] * len(seeds)),
        }
        guidance = Guidance(self.guidance, self.interval, self.batched)
        for wrap in wraps:
            guidance = wrap.guidance(guidance) if wrap.guidance else guidance
        guided = guidance.wrap(self.denoiser(wraps, blind, counter))
        times = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        x, solver = rng.normal(EVERY[self.name].shape), SOLVERS[self.solver].solver(noise, run)
        return march(Problem(x, times, guided, cond, solver, noise, rng, run))

    @contextmanager
    def applied(self, *plugins: Plugin, seeds: Sequence[int] = (0,)) -> Iterator[list[Wrap]]:
        """Wraps of these cache plugins with their networks installed, newest undone first."""
        wraps: list[Wrap] = []
        try:
            for plugin in plugins:
                wrap: Wrap = plugin.cache(self.network, self.run(seeds))
                wraps.append(wrap)
                if wrap.network:
                    assert wrap.network(self.module) is self.module
            yield wraps
        finally:
            for wrap in reversed(wraps):
                if wrap.undo:
                    wrap.undo()

    def cached(self, plugin: Plugin, seeds: Sequence[int] = (0,), blind: bool = False) -> tuple[Tensor, Any]:
        """(x0, report) of one run with this plugin."""
        with self.applied(plugin, seeds=seeds) as wraps:
            out = self.generate(seeds, wraps, blind)
        return out, wraps[0].report()

    @torch.inference_mode()
    def script(self, plugin: Plugin | None, states: Sequence[Tensor], branches: Sequence[str], **cond: Cond) -> Any:
        """Outputs for given states, one a step, whatever the network answers; a list for each branch in order.

        A joint branch, `cond+uncond`, gets each state once a branch and its conditionings joined.
        """
        out: dict[str, list[Tensor]] = {b: [] for b in branches}
        with self.applied(*([plugin] if plugin else [])) as wraps:
            denoiser = self.denoiser(wraps)
            for step, x in enumerate(states):
                t = 1 - step / len(states)
                for branch in branches:
                    call = Call(step, len(states), t, t - 1 / len(states), branch=branch, run_id="script")
                    many = len(call.branches)
                    joined = {k: torch.cat([cond[b][k] for b in call.branches]) for k in cond[call.branches[0]]}
                    got = denoiser.denoise(x.repeat(many, *[1] * (x.ndim - 1)), torch.tensor(t).double(), joined, call)
                    out[branch].append(got)
        return [out[b] for b in branches], [w.report() for w in wraps]


@dataclass
class Counting:
    """What ran under any patch: calls and rows of each part, by name."""

    calls: dict[str, int]
    rows: dict[str, int]
    order: list[str]


@contextmanager
def counting(network: Network, *kinds: str) -> Iterator[Counting]:
    """Count the calls of these parts from below: what a wrap skips does not get here."""
    seen = Counting({}, {}, [])
    refs = network.blocks(*kinds)

    def make(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            first = next(v for v in [*args, *kwargs.values()] if isinstance(v, Tensor))
            seen.calls[name] += 1
            seen.rows[name] += first.shape[0]
            seen.order.append(name)
            return forward(*args, **kwargs)

        return counted

    for ref in refs:
        seen.calls[ref.name] = seen.rows[ref.name] = 0
        ref.module.forward = make(ref.name, ref.module.forward)
    try:
        yield seen
    finally:
        for ref in refs:
            del ref.module.__dict__["forward"]
