"""A tiny random network with everything needed to generate from it: where wraps are checked."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from suite.call import Call, activate
from suite.diffusion.denoiser import Cond, Counter, Denoiser, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Flow, Masked, NoiseSchedule
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, Sampler, march
from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.fitting.calibration import Calibration, Record
from suite.host.manager import Manager
from suite.mesh import Mesh
from suite.network import Layout, Network
from suite.network.experts import SAME, Companion, Companions, switched
from suite.run import Run
from suite.testing.oracles import Euler, a_run
from suite.wrap import Wrap, WrapReport

CHANNELS, SIZE, TEXT, WORDS = 4, 8, 16, 5
VOCABULARY, MASK, PROMPT, LENGTH = 12, 1, 3, 8


def pixart(seed: int = 0) -> nn.Module:
    """A PixArt transformer of diffusers with random weights: 4 blocks, width 64, 16 tokens."""
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            cross_attention_dim=64,
            sample_size=SIZE,
            patch_size=2,
            caption_channels=TEXT,
            use_additional_conditions=False,
        )
    return module.eval().requires_grad_(False)


def modernbert(seed: int = 0, layers: int = 2) -> nn.Module:
    """A ModernBERT of transformers with random weights: full attention, width 32, 12 tokens of which 1 is the mask."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        layer_types=["full_attention"] * layers,
        initializer_range=0.5,  # so that what a token says depends on its neighbours
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = ModernBertForMaskedLM(config)
    return module.eval().requires_grad_(False)


def forward_tokens(module: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Logits of [prompt | x], or of the places `positions` of x alone; see `suite.network.Layout.parts`."""
    del time
    prompt, positions = cond["prompt"], cond.get("positions")
    embed = module.get_input_embeddings()
    if positions is None:
        sequence, places = torch.cat([embed(prompt), embed(x)], 1), None
    else:
        sequence, places = embed(x), prompt.shape[1] + positions
    body = module.model(inputs_embeds=sequence, position_ids=places).last_hidden_state
    return module.decoder(module.head(body[:, -x.shape[1] :]))


def diffusers_unet(**config: Any) -> nn.Module:
    """A U-Net of diffusers as it is made: 2 stages, widths 16 and 32, attention inside; `config` goes over it."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    common = {
        "sample_size": SIZE,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**common, **config})


def unet(seed: int = 0) -> nn.Module:
    """`diffusers_unet` with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = diffusers_unet()
    return module.eval().requires_grad_(False)


#: What `Plugin.kit_network` may name, and the network over tokens.
NETWORKS = {"transformer": pixart, "unet": unet, "tokens": modernbert}


def forward(module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call either network as `NetworkDenoiser` wants it."""
    states = cond["encoder_hidden_states"].to(x.dtype)
    if hasattr(module, "down_blocks"):
        mask = cond["encoder_attention_mask"]
        return module(x, time, states, encoder_attention_mask=mask, return_dict=False)[0]
    return module(
        x,
        encoder_hidden_states=states,
        encoder_attention_mask=cond["encoder_attention_mask"],
        timestep=time,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class Outcome:
    """Of one generation: x0, what the wrap reported (None without one), and what was counted."""

    x0: Tensor
    report: WrapReport | None
    counter: Counter


@dataclass
class Tiny:
    """One network with noise, prediction and conditionings. Nothing of it is trained."""

    module: nn.Module
    noise: NoiseSchedule = field(default_factory=Flow)
    prediction: Prediction = Prediction.FLOW
    dtype: torch.dtype = torch.float32
    steps: int = 11  # a prime: a counter that is not reset falls out of step in the second run
    guidance: float = 3.0

    @staticmethod
    def build(seed: int = 0, network: str = "transformer") -> Tiny:
        """A new one of `NETWORKS`; equal seeds give equal weights."""
        return Tiny(NETWORKS[network](seed))

    def copy(self) -> Tiny:
        """With weights of its own."""
        return replace(self, module=copy.deepcopy(self.module))

    def to(self, dtype: torch.dtype) -> Tiny:
        """A copy whose network computes in `dtype`."""
        return replace(self, module=copy.deepcopy(self.module).to(dtype), dtype=dtype)

    @property
    def network(self) -> Network:
        """As the hooks receive it."""
        return Network(self.module, Layout((CHANNELS, SIZE, SIZE), tokens=(SIZE // 2) ** 2))

    def run(self, seeds: Sequence[int] = (0,), **facts: Any) -> Run:
        """Facts of a run over these seeds."""
        base = {"steps": self.steps, "guidance": self.guidance, "batch": len(seeds), "seeds": tuple(seeds)}
        return a_run(**{**base, "model": "tiny", "dtype": "fp32", **facts})

    def cond(self, seeds: Sequence[int]) -> Mapping[str, Cond]:
        """Conditionings of both branches; a row depends on its seed only."""
        rows = SampleRng([1000 + s for s in seeds]).normal((WORDS, TEXT))
        mask = torch.ones(len(seeds), WORDS)
        shared = SampleRng([999]).normal((WORDS, TEXT)).expand_as(rows)
        return {
            "cond": {"encoder_hidden_states": rows, "encoder_attention_mask": mask},
            "uncond": {"encoder_hidden_states": shared.clone(), "encoder_attention_mask": mask.clone()},
        }

    def prior(self, seeds: Sequence[int]) -> Tensor:
        """x at t = 1."""
        return SampleRng(seeds).normal((CHANNELS, SIZE, SIZE))

    def calibration(self) -> Calibration:
        """Records of a plain run over as many samples as there are prompts."""

        def record(prompts: Sequence[str]) -> list[Record]:
            records: list[Record] = []

            class Recorder:
                def __init__(self, inner: Denoiser) -> None:
                    self.inner = inner

                def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
                    records.append(Record(x.clone(), t.clone(), cond, call))
                    return self.inner.denoise(x, t, cond, call)

            wrap = Wrap(report=lambda: WrapReport(0, "", reason="records only"), denoiser=Recorder)
            self.generate(range(len(prompts)), wrap)
            return records

        return Calibration(("one", "two"), record)

    def companions(self) -> Companions:
        """Networks of the same kind with other weights, a seed for each name; this one for `same`."""

        def open(name: str) -> Companion:
            if name == SAME:
                return Companion(name, "", self.network, forward)
            other = Tiny.build(1 + zlib.crc32(name.encode()) % 1000).to(self.dtype)
            return Companion(name, "", other.network, forward)

        return Companions(open)

    def wrap(self, manager: Manager, hook: str, run: Run | None = None, mesh: Mesh | None = None) -> Wrap | None:
        """The answer of the manager's plugin for one of the three collecting hooks; on a mesh of one by default."""
        run = run or self.run()
        (active,) = manager.of(hook)
        if hook == "compress":
            return manager.compress(self.network, self.calibration(), run, self.companions(), active)
        if hook == "parallelize":
            return manager.parallelize(self.network, mesh or Mesh(), run, active)
        return manager.cache(self.network, run, active, self.noise)

    def denoiser(self, wrap: Wrap | None = None, counter: Counter | None = None) -> Denoiser:
        """The network as a denoiser, with the wrap's network and denoiser parts applied."""
        module = wrap.network(self.module) if wrap and wrap.network else self.module
        counter = counter or Counter()
        bare = NetworkDenoiser(module, forward, self.noise, self.prediction, self.dtype, counter)
        denoiser = switched(bare, wrap.experts if wrap else ())
        return wrap.denoiser(denoiser) if wrap and wrap.denoiser else denoiser

    @torch.inference_mode()
    def generate(
        self, seeds: Sequence[int] = (0,), wrap: Wrap | None = None, *, batched: bool = True, run: Run | None = None
    ) -> Outcome:
        """Generate with Euler's step; undoes nothing."""
        seeds = tuple(seeds)
        run = run or self.run(seeds)
        counter = Counter()
        guidance = Guidance(run.guidance, run.guidance_interval, batched, tokens=self.noise.discrete)
        guidance = wrap.guidance(guidance) if wrap and wrap.guidance else guidance
        guided = guidance.wrap(self.denoiser(wrap, counter))
        sampler: Sampler = wrap.sampler(march) if wrap and wrap.sampler else march
        times = torch.linspace(1, 0, run.steps + 1, dtype=torch.float64)
        x = self.prior(seeds)
        if x.is_floating_point():
            x = x.to(torch.float64 if self.dtype is torch.float64 else torch.float32)
        rng = SampleRng(seeds)
        x0 = sampler(Problem(x, times, guided, self.cond(seeds), self._solver(), self.noise, rng, run))
        return Outcome(x0, wrap.report() if wrap else None, counter)

    def _solver(self) -> Solver:
        return Euler(self.noise)

    def state(self, seeds: Sequence[int], step: int) -> Tensor:
        """Some x for a step, the same for whoever asks."""
        x, t = self.prior(seeds), 1 - step / self.steps
        return t * x + (1 - t) * x.roll(1, -1)

    @torch.inference_mode()
    def once(self, module: nn.Module, seeds: Sequence[int] = (0,)) -> Tensor:
        """One plain evaluation of a module on this problem's input, as the engine would make it."""
        call = Call(0, self.steps, 1.0, 1 - 1 / self.steps, run_id="once")
        with activate(call):
            time = self.noise.time_input(torch.ones(len(seeds), dtype=torch.float64)).float()
            return forward(module, self.prior(seeds).to(self.dtype), time, self.cond(seeds)["cond"])


@dataclass(frozen=True)
class FromTheLeft(Solver):
    """Uncovers the first masked place with its most probable token at each step, and evaluates even if none is left."""

    block: int = 4
    facts = SolverFacts(order=1, discrete=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        best = denoise(x, t).argmax(-1)
        masked = x == MASK
        first = masked & (masked.long().cumsum(-1) == 1)
        return torch.where(first, best, x), state


@dataclass
class TinyTokens(Tiny):
    """The same over masked tokens: for plugins with the word `needs-tokens`."""

    noise: NoiseSchedule = field(default_factory=Masked)
    prediction: Prediction = Prediction.LOGITS

    @staticmethod
    def build(seed: int = 0, network: str = "tokens") -> TinyTokens:
        """A new one of `NETWORKS`; equal seeds give equal weights."""
        return TinyTokens(NETWORKS[network](seed))

    @property
    def network(self) -> Network:
        """As the hooks receive it."""
        return Network(self.module, Layout((LENGTH,), tokens=LENGTH, parts=True), timeless=True)

    def cond(self, seeds: Sequence[int]) -> Mapping[str, Cond]:
        """Prompts of both branches; a row depends on its seed only."""
        rows = (SampleRng([1000 + s for s in seeds]).uniform((PROMPT,)) * (VOCABULARY - 2)).long() + 2
        return {"cond": {"prompt": rows}, "uncond": {"prompt": torch.full_like(rows, 2)}}

    def prior(self, seeds: Sequence[int]) -> Tensor:
        """Masks."""
        return torch.full((len(seeds), LENGTH), MASK)

    def state(self, seeds: Sequence[int], step: int) -> Tensor:
        """x at a step: one token more is known at each."""
        known = (SampleRng(seeds).uniform((LENGTH,)) * (VOCABULARY - 2)).long() + 2
        return torch.where(torch.arange(LENGTH) < step, known, MASK)

    def denoiser(self, wrap: Wrap | None = None, counter: Counter | None = None) -> Denoiser:
        """The network as a denoiser, with the wrap's network and denoiser parts applied."""
        module = wrap.network(self.module) if wrap and wrap.network else self.module
        out: Denoiser = NetworkDenoiser(
            module, forward_tokens, self.noise, self.prediction, self.dtype, counter or Counter(), MASK
        )
        return wrap.denoiser(out) if wrap and wrap.denoiser else out

    def once(self, module: nn.Module, seeds: Sequence[int] = (0,)) -> Tensor:
        """One plain evaluation of a module on this problem's input, as the engine would make it."""
        with torch.inference_mode(), activate(Call(0, self.steps, 1.0, 1 - 1 / self.steps, run_id="once")):
            return forward_tokens(module, self.prior(seeds), torch.ones(len(seeds)), self.cond(seeds)["cond"])

    def _solver(self) -> Solver:
        return FromTheLeft()
