"""The shipped folders under diffusers' own pipeline: same network, same solver, same picture."""

import pytest
import torch

from suite import Engine
from suite.diffusion.denoiser import Counter, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Flow
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.recipe import Recipe

STEPS, SCALE = 8, 3.0


class WholeTimes(Flow):
    """diffusers' schedulers cut the time that they tell the network to a whole number; the suite does not."""

    def time_input(self, t):
        return (1000.0 * t).floor()


@pytest.fixture(scope="module")
def engine():
    recipe = {"steps": STEPS, "dtype": "fp32", "schedule": "uniform", "solver": "dpmpp-2m", "guidance": SCALE}
    with Engine.from_recipe(Recipe.from_dict(recipe)) as engine:
        yield engine


# torch's Tensor.__array__ inside diffusers' scheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_our_solver_draws_what_their_pipeline_draws(engine):
    from diffusers import PixArtAlphaPipeline

    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = PixArtAlphaPipeline.from_pretrained(engine.plan.folder.path, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    cond = engine.modality.encode(engine.request(["a red apple"]))
    x = SampleRng([3]).normal((3, 64, 64))
    theirs = pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=cond["cond"]["states"],
        prompt_attention_mask=cond["cond"]["mask"],
        negative_prompt_embeds=cond["uncond"]["states"],
        negative_prompt_attention_mask=cond["uncond"]["mask"],
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        height=64 * pipeline.vae_scale_factor,
        width=64 * pipeline.vae_scale_factor,
        latents=x,
        output_type="latent",
        use_resolution_binning=False,
    ).images
    run = engine._run(engine.request(["a red apple"]), [3])
    noise = WholeTimes()
    _, _, solver = engine.schedule_and_solver(run)
    network = NetworkDenoiser(
        engine.network.module, engine.modality.forward, noise, engine.modality.prediction, torch.float32, Counter()
    )
    guided = Guidance(SCALE).wrap(network)
    with torch.inference_mode():
        ours = march(Problem(x, pipeline.scheduler.sigmas.double(), guided, cond, solver, noise, SampleRng([3]), run))
    assert (ours - theirs).abs().max() < 1e-4
