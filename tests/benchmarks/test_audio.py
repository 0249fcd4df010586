"""What the recipes cost and give in sound: the captions of the clips in tests/data/audio, which no training saw."""

import os
from pathlib import Path

import numpy as np
import pytest

from suite import Engine
from suite.prompts import expand

pytest.importorskip("soundfile", reason="the extra audio is not installed")

from suite.modalities.audio.data import load_waves
from suite.modalities.audio.files import Sound
from suite.modalities.audio.mel import RATE
from suite.modalities.audio.metrics import evaluate

pytestmark = pytest.mark.bench
WAVES = Path(__file__).resolve().parents[1] / "data" / "audio" / "waves.safetensors"
SEEDS = int(os.environ.get("SUITE_BENCH_SEEDS", "2"))
NAMES = ("fad_music", "fad_speech", "tags", "wer")


def test_recipes():
    waves = load_waves(WAVES)
    prompts, seeds = expand(list(waves.texts), SEEDS, 0)
    print(
        f"\n{len(waves.texts)} captions, {SEEDS} seeds each\n{'case':12}" + "".join(f"{n:>12}" for n in NAMES), end=""
    )
    print(f"{'sample s':>12}{'decode s':>12}{'NFE':>6}{'peak GB':>9}")
    real = [Sound(waves.floats([k])[0].numpy(), RATE) for k in range(len(waves.texts))]
    floor = evaluate(real, waves.texts)
    print(f"{'real':12}" + "".join(f"{floor[n]:12.3f}" for n in NAMES), flush=True)
    for recipe in ("reference", "quality", "balanced", "fast"):
        with Engine.from_recipe(recipe, modality="audio") as engine:
            engine.generate(prompts[0])
            one = [engine.generate(prompts[0], seed=s).report for s in range(5)]
            results = list(engine.stream(prompts, seeds, batch=8))
        numbers = evaluate([s for r in results for s in r.artifacts], prompts)
        sample, decode = (np.median([r.seconds[k] for r in one]) for k in ("sample", "decode"))
        memory = (one[0].peak_memory_bytes or 0) / 1e9
        print(f"{recipe:12}" + "".join(f"{numbers[n]:12.3f}" for n in NAMES), end="")
        print(f"{sample:12.3f}{decode:12.3f}{one[0].nfe:6.0f}{memory:9.2f}", flush=True)
