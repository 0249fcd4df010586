"""The shipped audio model through the engine and the command: what a person and a researcher rely on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import suite
from suite import Engine
from suite.cli import main
from suite.errors import ConfigError
from suite.host.models import shipped
from suite.recipe import Recipe

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("torchaudio", reason="the extra audio is not installed")

from suite.modalities.audio.files import read
from suite.modalities.audio.mel import RATE, SAMPLES

STEPS = 4
PACKAGE = Path(suite.__file__).parent
PROMPT = "a slow melody on a violin"


def make(**changes):
    content = {"steps": STEPS, "dtype": "fp32", "schedule": "uniform", "solver": "ddim", "guidance": 3.0}
    return Recipe.from_dict(content | changes)


@pytest.fixture(scope="module")
def plain():
    with Engine.from_recipe(make(), modality="audio") as engine:
        yield engine


def test_same_seed_same_sound_and_other_seed_another(plain):
    first, again, other = (plain.generate(PROMPT, seed=s).artifacts[0] for s in (5, 5, 6))
    assert first.rate == RATE and first.samples.shape == (SAMPLES,) and first.samples.dtype == np.float32
    assert np.array_equal(first.samples, again.samples) and not np.array_equal(first.samples, other.samples)
    assert 0.01 < np.abs(first.samples).max() <= 1 and np.isfinite(first.samples).all()


def test_prompts_make_different_sounds_and_a_word_ends_in_silence(plain):
    music, word = (s.samples for s in plain.generate(["a church organ", "the word seven, female voice"]).artifacts)
    loudness = [np.sqrt(np.square(x[-RATE // 2 :]).mean() / np.square(x).mean()) for x in (music, word)]
    assert loudness[1] < 0.2 < loudness[0]


def test_a_sample_does_not_depend_on_its_batch(plain):
    alone = plain.generate(PROMPT, seed=5)
    together = plain.generate(["a cowbell", PROMPT], seed=5, hold_seed=True)
    # Equal noise; matrix products of another size round differently, and Griffin-Lim lets phases drift a little.
    a, b = alone.artifacts[0].samples, together.artifacts[1].samples
    assert np.square(a - b).mean() < 1e-3 * np.square(a).mean()


def test_seconds_cut_the_sound_and_are_in_the_report(plain):
    whole = plain.generate(PROMPT, seed=1).artifacts[0].samples
    result = plain.generate(PROMPT, seed=1, options={"seconds": 0.5})
    part = result.artifacts[0]
    assert part.seconds == 0.5 and part.samples[-1] == 0 and result.report.options == {"seconds": 0.5}
    assert np.array_equal(part.samples[:7000], whole[:7000])
    with pytest.raises(ConfigError, match=r"0\.25 to 2\.048"):
        plain.generate(PROMPT, options={"seconds": 3.0})


@pytest.mark.parametrize("cache", ["fora:interval=1", "first-block:threshold=0"])
def test_caches_at_their_off_setting_change_nothing(plain, cache):
    with Engine.from_recipe(make(cache=cache), modality="audio", allow_noop=True) as engine:
        got, want = (e.generate(PROMPT, seed=3).artifacts[0].samples for e in (engine, plain))
    assert np.array_equal(got, want)


def test_int8_keeps_the_sound_close(plain):
    with Engine.from_recipe(make(compress="int8"), modality="audio") as engine:
        small = engine.generate(PROMPT, seed=3)
    exact = plain.generate(PROMPT, seed=3)
    assert small.report.network_bytes < 0.45 * exact.report.network_bytes
    from suite.modalities.audio.mel import log_mel

    pictures = [log_mel(torch.from_numpy(r.artifacts[0].samples)[None]) for r in (small, exact)]
    assert (pictures[0] - pictures[1]).abs().mean() < 0.05  # of a range of 2


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_command_writes_replays_and_says_the_same(tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.chdir(tmp_path)
    name = f"x{suffix}"
    assert main(["audio", PROMPT, "-o", name, "--steps", "2", "--seconds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["reports"][0]
    assert (report["modality"], report["depth"], report["options"]) == ("audio", 2, {"seconds": 1.0})
    assert abs(read(tmp_path / name).seconds - 1) < 0.1
    if suffix == ".mp3":  # the slower part once is enough
        assert main(["replay", name]) == 0
        assert "is bit-identical to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((PROMPT, "-o", "x.ogg"), "expected .wav, .flac, .mp3"),
        ((PROMPT, "--seconds", "3"), "--seconds 3.0: expected a number from 0.25 to 2.048"),
        ((PROMPT, "--frames", "3"), "--frames"),
        ((" ", "-o", "x.wav"), "prompt"),
    ],
)
def test_bad_requests_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["audio", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_encoder_is_named_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("soundfile.available_formats", lambda: {"WAV": "", "FLAC": ""})
    assert main(["audio", PROMPT, "-o", "x.mp3"]) == 2
    assert "no encoder for .mp3; choose .wav, .flac" in capsys.readouterr().err


def test_a_folder_without_its_vocoder_is_refused(plain, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(plain.plan.folder.path, folder)
    shutil.rmtree(folder / "vocoder")
    with pytest.raises(ConfigError, match="is not a vocoder"):
        Engine.from_recipe(make(), modality="audio", model=str(folder))


# torch's Tensor.__array__ inside diffusers' scheduler.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_opens_the_folder(plain):
    from diffusers import PixArtAlphaPipeline

    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = PixArtAlphaPipeline.from_pretrained(plain.plan.folder.path, dtype=torch.float32, **parts)
    ours = plain.network.module.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in pipeline.transformer.state_dict().items())


def test_vocoder_opens_by_from_pretrained(plain):
    from suite.modalities.audio.vocoder import Vocoder

    network = Vocoder.from_pretrained(plain.plan.folder.path / "vocoder", dtype=torch.float32)
    ours = plain.modality.vocoder.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in network.state_dict().items())


def test_shipped_weights_fit_their_allowance():
    files = [f for e in shipped("audio").values() for f in (PACKAGE / e["path"]).rglob("*.safetensors")]
    files += (PACKAGE / "modalities" / "audio" / "metrics").rglob("*.safetensors")
    assert len(files) >= 4 and sum(f.stat().st_size for f in files) <= 24 * 2**20
    assert all(f.stat().st_size <= 16 * 2**20 for f in files)


def test_strength_0_is_the_sound_through_the_codec_and_1_the_plain_run(plain, tmp_path):
    from suite.modalities.audio.fold import unfold

    file = tmp_path / "bell.wav"
    plain.generate("a cowbell", seed=9).save(file)
    nothing = plain.generate(PROMPT, seed=5, init=plain.init(file, 0))
    x0 = plain.modality.to_x0(read(file), plain.request((PROMPT,)))
    assert nothing.report.nfe == 0
    assert np.array_equal(nothing.artifacts[0].samples, plain.modality.decode(x0, plain.request((PROMPT,)))[0].samples)
    # The vocoder keeps the picture of the sound, not its phases: in [-1, 1], over 96 dB.
    again = plain.modality.to_x0(nothing.artifacts[0], plain.request((PROMPT,)))
    difference = (unfold(again, plain.modality.fold) - unfold(x0, plain.modality.fold)).abs()
    assert difference.mean() < 0.05
    everything, usual = (plain.generate(PROMPT, seed=5, init=i).artifacts[0] for i in (plain.init(file, 1), None))
    assert np.array_equal(everything.samples, usual.samples)


def test_sounds_of_other_rates_and_lengths_can_be_begun_with(plain, tmp_path):
    import soundfile

    time = np.arange(44_100) / 44_100
    stereo = np.stack([np.sin(2 * np.pi * 440 * time)] * 2, 1) / 2
    soundfile.write(tmp_path / "tone.flac", stereo, 44_100)
    picture = plain.modality.to_x0(read(tmp_path / "tone.flac"), plain.request((PROMPT,)))
    soundfile.write(tmp_path / "low.wav", np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) / 2, 16_000)
    other = plain.modality.to_x0(read(tmp_path / "low.wav"), plain.request((PROMPT,)))
    assert (picture - other).abs().mean() < 0.02  # one second of the same tone, and then silence
    result = plain.generate(PROMPT, init=plain.init(tmp_path / "tone.flac", 0.5))
    assert (result.report.steps, result.report.nfe) == (2, 4)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    with pytest.raises(ConfigError, match="0 samples"):
        plain.init(tmp_path / "none.wav")
