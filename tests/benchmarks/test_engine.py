"""What the engine costs, against the bare network and against diffusers' own loop; both in one run, interleaved."""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from suite import Engine
from suite.recipe import Recipe

pytestmark = pytest.mark.bench
STEPS, ROUNDS = 20, 15


def spread(values):
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]"


def recipe(**changes):
    content = {"steps": STEPS, "dtype": "fp32", "schedule": "log-snr", "solver": "dpmpp-2m", "guidance": 3.0}
    return Recipe.from_dict(content | changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_overhead_over_the_network(dtype):
    """Sampling time over the time spent inside the network's forward, of the same run."""
    engine = Engine.from_recipe(recipe(dtype=dtype))
    module = engine.network.module
    inside = 0.0
    plain = module.forward

    def timed(*args, **kwargs):
        nonlocal inside
        start = time.perf_counter()
        out = plain(*args, **kwargs)
        inside += time.perf_counter() - start
        return out

    module.forward = timed
    ratios = []
    for _ in range(ROUNDS):
        inside = 0.0
        report = engine.generate("a red apple").report
        ratios.append(report.seconds["sample"] / inside)
    print(f"\nengine / network, {dtype}, batch 1, {STEPS} steps: {spread(ratios)}")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' scheduler
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_against_diffusers_loop(dtype):
    """diffusers' PixArt pipeline with the same network, steps, dtype, guidance and the same solver of its own."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    engine = Engine.from_recipe(recipe(dtype=dtype))
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    pipeline = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=engine.network.module, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    cond = engine.modality.encode(engine.request(["a red apple"]))
    kind = next(engine.network.module.parameters()).dtype

    def theirs():
        start = time.perf_counter()
        pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=cond["cond"]["states"].to(kind),
            prompt_attention_mask=cond["cond"]["mask"],
            negative_prompt_embeds=cond["uncond"]["states"].to(kind),
            negative_prompt_attention_mask=cond["uncond"]["mask"],
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            height=64 * pipeline.vae_scale_factor,
            width=64 * pipeline.vae_scale_factor,
            output_type="latent",
            use_resolution_binning=False,
        )
        return time.perf_counter() - start

    def ours():
        return engine.generate("a red apple").report.seconds["sample"]

    theirs(), ours()
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    print(f"\nours / diffusers, {dtype}, {STEPS} steps: {spread([a / b for a, b in pairs])}")
    print(f"  ours {spread([a for a, _ in pairs])} s, diffusers {spread([b for _, b in pairs])} s")


def test_recipes():
    """Wall-clock of the shipped recipes for one picture, after loading, and their ratios to `reference`."""
    engines = {name: Engine.from_recipe(name) for name in ("reference", "quality", "balanced", "fast")}
    times = {name: [] for name in engines}
    for round_ in range(6):
        for name, engine in engines.items():
            seconds = engine.generate("a red apple", seed=round_).report.seconds
            if round_:
                times[name].append(seconds["encode"] + seconds["sample"] + seconds["decode"])
    print()
    for name, values in times.items():
        ratios = [r / v for r, v in zip(times["reference"], values, strict=True)]
        print(f"{name:10} {spread(values)} s, {spread(ratios)} times faster than reference")


def test_start_up():
    """Seconds of commands that must not load torch, and peak memory of one picture."""
    print()
    for command in (["--help"], ["plugins", "list"]):
        values = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "suite.cli", *command], check=True, capture_output=True)
            values.append(time.perf_counter() - start)
        print(f"suite {' '.join(command):14} {spread(values)} s")
    code = (
        "from suite import Engine; "
        "print(Engine.from_recipe('balanced').generate('a red apple').report.peak_memory_bytes)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    print(f"peak memory of one picture: {int(out) / 2**20:.0f} MiB")


@pytest.mark.parametrize("threads", [torch.get_num_threads()])
def test_machine(threads):
    """Product rates of this machine, for the floor."""
    print()
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        rates = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            rates.append(2 * 2048 * 1024 * 1024 / (time.perf_counter() - start) / 1e12)
        print(f"{dtype}: {spread(rates)} TFLOP/s on {threads} threads")
