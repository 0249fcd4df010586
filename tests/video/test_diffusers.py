"""The shipped folder under diffusers' own pipeline: same network, same solver, same code of a clip."""

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `video` is not installed")

from suite import Engine
from suite.diffusion.denoiser import Counter, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import Flow
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march
from suite.modalities.video.tubes import together
from suite.recipe import Recipe

STEPS, SCALE = 4, 3.0


class WholeTimes(Flow):
    """diffusers' schedulers cut the time that they tell the network to a whole number; the suite does not."""

    def time_input(self, t):
        return (1000.0 * t).floor()


# torch's Tensor.__array__ inside diffusers' scheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_our_solver_makes_what_their_pipeline_makes():
    from diffusers import LattePipeline

    recipe = {"steps": STEPS, "dtype": "fp32", "schedule": "uniform", "solver": "dpmpp-2m", "guidance": SCALE}
    with Engine.from_recipe(Recipe.from_dict(recipe), modality="video") as engine:
        parts = {"vae": None, "text_encoder": None, "tokenizer": None}
        pipeline = LattePipeline.from_pretrained(engine.plan.folder.path, dtype=torch.float32, **parts)
        pipeline.set_progress_bar_config(disable=True)
        request = engine.request(["a red heart"], "a blue house")
        # Without padding, for the pipeline has no mask; both prompts have five tokens.
        cond = {
            branch: {key: value[:, :5] for key, value in found.items()}
            for branch, found in engine.modality.encode(request).items()
        }
        assert all(bool(found["mask"].all()) for found in cond.values())
        x = SampleRng([3]).normal(engine.modality.shape)
        theirs = pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=cond["cond"]["states"],
            negative_prompt_embeds=cond["uncond"]["states"],
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            video_length=engine.modality.shape[1],
            height=64 * pipeline.vae_scale_factor,
            width=64 * pipeline.vae_scale_factor,
            latents=together(x, engine.modality.shared),
            mask_feature=False,
            output_type="latent",
        ).frames
        run = engine._run(request, [3])
        noise = WholeTimes()
        _, _, solver = engine.schedule_and_solver(run)
        network = NetworkDenoiser(
            engine.network.module, engine.modality.forward, noise, engine.modality.prediction, torch.float32, Counter()
        )
        guided = Guidance(SCALE).wrap(network)
        times = pipeline.scheduler.sigmas.double()
        with torch.inference_mode():
            ours = march(Problem(x, times, guided, cond, solver, noise, SampleRng([3]), run))
    # Steps of a solver are linear, so they commute with the change of coordinates.
    assert (together(ours, engine.modality.shared) - theirs).abs().max() < 1e-4
