"""The audio training set and the two trainings, on the clips that ship and on archives of a few made-up samples."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from suite.errors import ConfigError
from suite.modalities.shared.caption_table import named_captions
from suite.modalities.shared.text_encoder import TokenStates
from suite.training.loop import TrainOptions

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("torchaudio", reason="the extra audio is not installed")

import soundfile

from suite.modalities.audio import data as audio_data
from suite.modalities.audio import sources, training, vocoder_training
from suite.modalities.audio.config import AudioTraining, kind_of, read
from suite.modalities.audio.data import load, load_waves, write_mel, write_waves
from suite.modalities.audio.mel import RATE, SAMPLES, log_mel, spectrum
from suite.modalities.audio.sources import FADE, GROUPS, PEAK, Clip, finished
from suite.modalities.audio.vocoder import Vocoder

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "audio"
SMALL = {
    "sample_size": 64,
    "patch_size": 1,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 384,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}
QUICK = TrainOptions(steps=3, precision="fp32", compile=False, warmup=1, log_every=1, lr=1e-2, save_every=100)


def encoder(prompts, length):
    """Token states from a hash: as many tokens as words, and the two marks."""
    states, mask = torch.zeros(len(prompts), length, 384), torch.zeros(len(prompts), length)
    for row, prompt in enumerate(prompts):
        count = min(length, 2 + len(prompt.split()))
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
        states[row, :count] = torch.randn(count, 384, generator=torch.Generator().manual_seed(seed))
        mask[row, :count] = 1
    return TokenStates(states, mask)


def clip(k: int, group: str = "music") -> Clip:
    sound = np.random.default_rng(k).normal(0, 0.1, SAMPLES).astype(np.float32)
    texts = (f"a sound {k}", f"sound {k}, short") if k % 2 else (f"a sound {k}",)
    return Clip(finished(sound), group, texts, f"label {k}", f"{group}/{k}")


@pytest.fixture(scope="module")
def shipped():
    return load(FOLDER / "mel.safetensors")


@pytest.fixture(scope="module")
def waves():
    return load_waves(FOLDER / "waves.safetensors")


def test_shipped_pictures_are_those_of_the_shipped_sound(shipped, waves):
    assert waves.held_out == 12 and len(shipped) == 36 and set(waves.groups) == set(GROUPS)
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 1.5 * 2**20
    ours = {shipped.texts[row[0]]: k for k, row in enumerate(shipped.captions.tolist())}
    checked = 0
    for k, text in enumerate(waves.texts):
        if waves.texts.count(text) == 1:
            picture = shipped.pictures[ours[text]].float() / 127.5 - 1
            error = (picture - log_mel(waves.floats([k]))[0]).square().mean().sqrt()
            assert error < 0.03  # of a range of 2: the WebP is lossy
            checked += 1
    assert checked > 15


def test_round_trip_of_pictures_and_captions(tmp_path):
    made = [clip(k, GROUPS[k % 5]) for k in range(70)]  # more than one tile
    data = load(write_mel(tmp_path / "m.safetensors", made, [], encoder))
    assert len(data) == 70 and data.groups == tuple(c.group for c in made) and data.labels[3] == "label 3"
    assert data.texts[0] == "" and data.texts[data.captions[3, 1]] == "sound 3, short"
    assert data.captions[2].tolist() == [data.captions[2, 0]] * 2  # a clip with fewer captions repeats its own
    want = torch.stack([log_mel(torch.from_numpy(c.sound)[None])[0] for c in made])
    assert (data.pictures.float() / 127.5 - 1 - want).square().mean().sqrt() < 0.06  # noise is what WebP does worst
    got, states = data.bank.states([3], 24), encoder([data.texts[3]], 24)
    assert torch.equal(got.mask, states.mask) and (got.states - states.states).norm() / states.states.norm() < 0.02


def test_same_clips_same_bytes(tmp_path):
    made = [clip(k) for k in range(4)]
    a, b = (write_mel(tmp_path / name, made, [], encoder).read_bytes() for name in ("a", "b"))
    assert a == b


def test_waves_keep_the_held_out_first_and_stay_within_the_limit(tmp_path):
    made = [clip(k) for k in range(130)]
    held = [c for c in made if c.held_out]
    assert 0 < len(held) < 30
    whole = load_waves(write_waves(tmp_path / "w.safetensors", made, []))
    assert whole.held_out == len(held) and len(whole.labels) == 130
    assert set(whole.labels[: len(held)]) == {c.label for c in held}
    k = [c.label for c in made].index(whole.labels[0])
    assert np.abs(whole.floats([0])[0].numpy() - made[k].sound).max() < 1e-4
    small = write_waves(tmp_path / "s.safetensors", made, [], limit=5_000_000)
    assert small.stat().st_size <= 5_000_000 and len(held) < len(load_waves(small).labels) < 130


def test_too_large_a_set_is_refused_whole(tmp_path):
    with pytest.raises(ConfigError, match=r"more than 0\.0 MiB"):
        write_mel(tmp_path / "m.safetensors", [clip(0)], [], encoder, limit=1000)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="suite data prepare audio"):
        load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="give the other file"):
        load(FOLDER / "waves.safetensors")
    with pytest.raises(ConfigError, match="give the other file"):
        load_waves(FOLDER / "mel.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((FOLDER / "mel.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is damaged"):
        load(cut)


def test_a_finished_clip_has_its_peak_and_its_fade():
    done = finished(np.full(100_000, 0.2, np.float32))
    assert done.shape == (SAMPLES,) and done.max() == pytest.approx(PEAK) and abs(done[-1]) < 1e-6
    assert np.ptp(done[:-FADE]) < 1e-6
    assert finished(np.zeros(3, np.float32)).tolist() == [0.0] * SAMPLES


def test_effects_are_read_in_all_speeds(tmp_path, monkeypatch):
    stream = io.BytesIO()
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100) * 0.5
    soundfile.write(stream, tone, 44100, format="FLAC")
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        for name in ("drum_cowbell", "unknown_thing"):
            item = tarfile.TarInfo(f"package/samples/{name}.flac")
            item.size = len(stream.getvalue())
            tar.addfile(item, io.BytesIO(stream.getvalue()))
    with pytest.raises(ConfigError, match="gave 1 captioned samples"):
        list(sources._effects(tmp_path / "x.tgz", 1))
    monkeypatch.setattr("suite.modalities.audio.effects.EXPECTED", 1)
    found = list(sources._effects(tmp_path / "x.tgz", 1))
    assert [c.label for c in found] == ["cowbell"] * 5 and found[0].captions[0] == "a cowbell"
    peaks = [int(spectrum(torch.from_numpy(c.sound)[None]).abs()[0, :, 20].argmax()) * RATE / 1024 for c in found]
    assert peaks == pytest.approx([440, 391, 495, 352, 550], abs=10)


@pytest.mark.skipif(
    not (shutil.which("fluidsynth") and shutil.which("flite")), reason="fluidsynth and flite are not installed"
)
def test_words_are_spoken_and_trimmed():
    from suite.modalities.audio.speech import VOICES, Spoken

    made = list(sources._words([Spoken("seven", VOICES[0], 1.0), Spoken("nine", VOICES[3], 1.2)]))
    assert [c.group for c in made] == ["digits", "digits"] and made[0].captions[0] == "the word seven, female voice"
    for c in made:
        loud = np.flatnonzero(np.abs(c.sound) > 0.02)
        assert 0.04 * RATE < loud[0] < 0.25 * RATE and 0.2 * RATE < loud[-1] - loud[0] < 1.2 * RATE


def test_generator_trains_resumes_and_exports(shipped, tmp_path, monkeypatch):
    config = AudioTraining("tiny", SMALL, shares={"music": 1.0, "digits": 1.0}, batch=4, text_length=8, train=QUICK)
    monkeypatch.setattr(training, "read", lambda path, overrides: config)
    recipe = tmp_path / "x.yaml"
    recipe.write_text("name: tiny\n")
    folder = training.train(recipe, FOLDER / "mel.safetensors", tmp_path / "run")
    assert folder == tmp_path / "run" / "model"
    assert {p.name for p in folder.iterdir()} == {
        "loss.csv",
        "model_index.json",
        "scheduler",
        "suite.json",
        "transformer",
    }
    assert (tmp_path / "run" / "samples-000003.png").is_file()
    longer = replace(config, train=replace(QUICK, steps=4))
    monkeypatch.setattr(training, "read", lambda path, overrides: longer)
    training.train(recipe, FOLDER / "mel.safetensors", tmp_path / "run", resume=True)
    assert len((tmp_path / "run" / "loss.csv").read_text().splitlines()) == 5


def test_draws_follow_the_shares(shipped):
    config = AudioTraining("tiny", SMALL, shares={"music": 3.0, "digits": 1.0}, batch=4, text_length=8)
    batches = training.make_batches(shipped, config, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(batches.chances, 4000, replacement=True, generator=rng)
    share = np.mean([shipped.groups[k] == "music" for k in drawn.tolist()])
    assert share == pytest.approx(0.75, abs=0.03)
    x0, text = batches.draw(8, 1.0, rng)
    assert x0.shape == (8, *config.shape) and x0.abs().max() <= 1
    assert torch.equal(text.states, batches.captions.conditions(torch.zeros(8, dtype=torch.long)).states)
    with pytest.raises(ConfigError, match="no group 'whales'"):
        training.make_batches(shipped, replace(config, shares={"whales": 1.0}), torch.device("cpu"))


def test_vocoder_trains_and_improves_on_what_it_begins_with(waves, tmp_path, monkeypatch):
    options = replace(QUICK, steps=30, lr=3e-3)
    config = vocoder_training.VocoderTraining(
        "v", model={"width": 32, "inner": 64, "layers": 2}, batch=4, train=options
    )
    monkeypatch.setattr(vocoder_training, "read_training", lambda kind, path, overrides: config)
    folder = vocoder_training.train("x.yaml", FOLDER / "waves.safetensors", tmp_path / "run")
    trained = Vocoder.from_pretrained(folder, dtype=torch.float32)
    real = waves.floats(slice(0, 8))
    with torch.inference_mode():
        untrained = Vocoder(**config.model)
        after, before = (
            float(vocoder_training.compare(v(log_mel(real)), spectrum(real).abs())) for v in (trained, untrained)
        )
    assert after < 0.97 * before


@pytest.mark.parametrize("name", ["audio-16k", "audio-16k-gpu", "audio-vocoder"])
def test_shipped_recipes_can_be_read(name):
    path = ROOT / "configs" / "training" / f"{name}.yaml"
    if kind_of(path) == "vocoder":
        config = vocoder_training.read_training(vocoder_training.VocoderTraining, path)
        assert sum(p.numel() for p in Vocoder(**config.model).parameters()) < 4e6
    else:
        config = read(path)
        assert sum(p.numel() for p in training.build(config).parameters()) < 8.4e6  # 16 MiB in float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": [7, 2]}, "divide 80 and 128"),
        ({"shares": {"music": -1}}, "expected such as"),
        ({"batch": 0}, "batch must be 1 or more"),
    ],
)
def test_wrong_recipes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AudioTraining(**{"name": "x", "model": SMALL} | changes)
    with pytest.raises(ConfigError, match="refuses these settings"):
        training.build(AudioTraining("x", {"no_such": 1}))


def test_sheets_show_captions_of_the_data(shipped):
    config = AudioTraining("x", SMALL, sheet=(shipped.texts[2],))
    assert named_captions(shipped.texts, config.sheet, 16).tolist() == [2]
    with pytest.raises(ConfigError, match="has no caption 'a whale'"):
        named_captions(shipped.texts, ("a whale",), 16)


def test_prepare_asks_for_a_size_of_one_or_more():
    with pytest.raises(ConfigError, match="--size 0"):
        audio_data.prepare(size=0)
