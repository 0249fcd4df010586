"""Sound and its pictures: the spectrum, folding, phases, files, MIDI and captions. No trained weights are needed."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from suite.errors import ConfigError

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("torchaudio", reason="the extra audio is not installed")

from suite.modalities.audio import effects, midi, music, sheet, speech
from suite.modalities.audio.data import load_waves
from suite.modalities.audio.files import SUFFIXES, Sound, read, read_metadata, write
from suite.modalities.audio.fold import fold, folded_shape, unfold
from suite.modalities.audio.mel import (
    BANDS,
    FRAMES,
    HOP,
    RATE,
    SAMPLES,
    WINDOW,
    faded,
    filterbank,
    log_mel,
    sound_of,
    spectrum,
    to_logarithm,
    to_picture,
)
from suite.modalities.audio.metrics.reconstruction import si_sdr, stft_distance
from suite.modalities.audio.riff import add_comment, read_comment
from suite.modalities.audio.vocoder import Vocoder, agree, first_phases, griffin_lim, plain_inverse, spread

WAVES = Path(__file__).parents[1] / "data" / "audio" / "waves.safetensors"


def tone(frequency: float, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * frequency * torch.arange(SAMPLES) / RATE)[None]


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return load_waves(WAVES).floats(slice(0, 12))


def test_spectrum_and_back_are_exact_but_for_the_last_frames(real):
    again = sound_of(spectrum(real))
    assert again.shape == real.shape
    # The last frame stands for the one behind the end, which a picture does not hold: two hops are inexact.
    assert (again - real)[:, : -2 * HOP].abs().max() < 1e-5


def test_a_full_scale_sine_has_the_magnitude_that_the_vocoder_allows():
    loudest = spectrum(tone(1000, 1.0)).abs()[:, :, 4:-4].max()
    assert float(loudest.log()) == pytest.approx(math.log(WINDOW / 4), abs=0.01)


def test_a_tone_lights_the_band_of_its_frequency():
    picture = log_mel(tone(1000))[0, :, 64]
    weights = filterbank()
    assert int(picture.argmax()) == int(weights[:, round(1000 * WINDOW / RATE)].argmax())


def test_picture_range_is_what_it_says():
    logarithm = torch.tensor([-30.0, -10.0, -4.5, 1.0, 9.0])
    assert to_picture(logarithm).tolist() == [-1, -1, 0, 1, 1]
    inside = torch.linspace(-9.9, 0.9, 7)
    assert torch.allclose(to_logarithm(to_picture(inside)), inside, atol=1e-5)
    assert torch.equal(log_mel(torch.zeros(1, SAMPLES)), -torch.ones(1, BANDS, FRAMES))


@pytest.mark.parametrize("shape", [(SAMPLES,), (1, SAMPLES + 1), (1, 512)])
def test_spectrum_refuses_other_lengths(shape):
    with pytest.raises(ConfigError, match="expected \\[N, S\\]"):
        spectrum(torch.zeros(shape))


@pytest.mark.parametrize("patch", [(80, 2), (20, 4), (8, 8), (1, 1)])
def test_folding_is_lossless_and_keeps_neighbours_together(patch):
    pictures = torch.arange(2 * BANDS * FRAMES, dtype=torch.float32).reshape(2, BANDS, FRAMES)
    folded = fold(pictures, patch)
    assert folded.shape[1:] == folded_shape(patch)
    assert torch.equal(unfold(folded, patch), pictures)
    assert torch.equal(folded[0, :, 0, 0], pictures[0, : patch[0], : patch[1]].flatten())


@pytest.mark.parametrize("patch", [(3, 2), (80,), (0, 2), (80, 3)])
def test_folding_refuses_a_patch_that_does_not_divide(patch):
    with pytest.raises(ConfigError, match="divide 80 and 128"):
        folded_shape(patch)


def test_a_cut_ends_in_silence():
    out = faded(torch.ones(1, 1000))
    assert out[0, -1] == 0 and torch.equal(out[0, :744], torch.ones(744))


def test_spreading_keeps_the_energy_of_a_band_and_agreement_restores_it(real):
    pictures = log_mel(real)
    logarithm = spread(pictures)
    before = (log_of_mel(logarithm) - pictures).abs().mean()
    after = (log_of_mel(agree(logarithm, pictures)) - pictures).abs().mean()
    assert after < 0.25 * before


def log_of_mel(logarithm: torch.Tensor) -> torch.Tensor:
    return to_picture((filterbank() @ logarithm.exp()).clamp(min=1e-12).log())


@pytest.mark.parametrize("frequency", [220.0, 440.0, 1333.3])
def test_first_phases_carry_a_steady_tone_without_a_single_iteration(frequency):
    magnitude = spectrum(tone(frequency)).abs()
    made = griffin_lim(magnitude, first_phases(magnitude), 0)
    middle = slice(8 * HOP, -8 * HOP)
    phase = spectrum(made)[0, round(frequency * WINDOW / RATE), 8:-8].abs()
    # Were the frames out of step, overlapping them would cancel the tone here and there.
    assert phase.min() > 0.9 * phase.max()
    assert made[:, middle].abs().max() == pytest.approx(0.5, rel=0.1)


def test_griffin_lim_comes_nearer_with_every_iteration(real):
    magnitude = spectrum(real).abs()
    start = torch.zeros_like(magnitude)
    far = [stft_distance(griffin_lim(magnitude, start, n), real).mean() for n in (0, 4, 16)]
    assert far[0] > far[1] > far[2]


def test_true_magnitudes_give_nearly_the_sound_back_so_phases_are_not_what_is_lost(real):
    magnitude = spectrum(real).abs()
    made = griffin_lim(magnitude, first_phases(magnitude), 16)
    plain = plain_inverse(log_mel(real))
    assert stft_distance(made, real).mean() < 0.25 < 0.4 < stft_distance(plain, real).mean() < 1.0


def test_an_untrained_vocoder_already_makes_the_sound_of_a_picture(real):
    network = Vocoder(width=16, inner=16, layers=1)
    with torch.inference_mode():
        made = network.sound(log_mel(real))
    assert made.shape == real.shape and made.abs().max() <= 1
    assert (log_mel(made) - log_mel(real)).abs().mean() < 0.04


def test_si_sdr_against_its_definition():
    real = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    noise -= (noise * real).sum() / real.square().sum() * real  # orthogonal, so that the ratio is exact
    noise *= real.norm() / noise.norm() / 10
    assert float(si_sdr(3 * (real + noise), real)) == pytest.approx(20, abs=1e-3)
    assert float(stft_distance(real, real)) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_keep_sound_and_metadata(tmp_path, suffix):
    sound = Sound(tone(440)[0].numpy(), RATE)
    metadata = {"suite": {"prompt": "é, 音", "long": "x" * 5000}, "index": 3}
    path = tmp_path / f"tone{suffix}"
    write(sound, path, metadata)
    assert read_metadata(path) == metadata
    again = read(path)
    assert (again.rate, len(again.samples)) == (RATE, SAMPLES) and again.seconds == pytest.approx(2.048)
    error = np.abs(again.samples - sound.samples).max()
    assert error < (0.05 if suffix == ".mp3" else 1e-4)


def test_files_without_our_metadata_say_so(tmp_path):
    path = tmp_path / "other.wav"
    write(Sound(np.zeros(2000, np.float32), RATE), path, {})
    path.write_bytes(path.read_bytes().partition(b"LIST")[0])
    with pytest.raises(ConfigError, match="was not made by this suite"):
        read_metadata(path)
    (tmp_path / "text.wav").write_text("no sound")
    for function in (read, read_metadata):
        with pytest.raises(ConfigError, match="not a readable sound file"):
            function(tmp_path / "text.wav")


@pytest.mark.parametrize("text", ["odd", "even", "x" * 70_000])
def test_riff_comment_is_a_well_formed_chunk(tmp_path, text):
    path = tmp_path / "a.wav"
    body = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * 2, 2, 16) + b"data" + struct.pack("<I", 2) + b"\0\0"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)
    assert read_comment(path) is None
    add_comment(path, text)
    assert read_comment(path) == text
    assert struct.unpack("<I", path.read_bytes()[4:8])[0] == path.stat().st_size - 8
    assert len(read(path).samples) == 1
    with pytest.raises(ConfigError, match="not a WAV file"):
        add_comment(Path(__file__), text)


def test_midi_file_is_what_the_standard_says():
    phrase = midi.Phrase((midi.Note(0.5, 0.25, 60, 90),), ((0, 40),))
    data = midi.write_midi([phrase, phrase], 2.0)
    assert data[:14] == b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000)
    assert struct.unpack(">I", data[18:22])[0] == len(data) - 22
    assert data.endswith(b"\x00\xff\x2f\x00")
    assert data.count(bytes((0x90, 60, 90))) == data.count(bytes((0xC0, 40))) == data.count(bytes((0xB0, 120, 0))) == 2
    # The program change is at 0, the note at 0.01 + 0.5 s: 510 ticks, as a variable-length quantity 83 7e.
    assert b"\x83\x7e" + bytes((0x90, 60, 90)) in data


def test_pieces_are_what_their_captions_say():
    made = list(music.pieces(40, 40))
    again = list(music.pieces(40, 40))
    assert made == again and len(made) == 40 * len(music.INSTRUMENTS) + 40
    by_name = {i.name: i for i in music.INSTRUMENTS}
    for piece in made:
        assert piece.phrase.notes and all(0 <= n.start < music.SECONDS and n.length > 0 for n in piece.phrase.notes)
        assert all(n.start + n.length <= music.SECONDS + 1e-9 for n in piece.phrase.notes)
        text = piece.captions[0]
        if piece.label == "drums":
            assert all(n.channel == midi.DRUMS for n in piece.phrase.notes) and text.endswith("drum beat")
            continue
        assert dict(piece.phrase.programs)[0] == by_name[piece.label].program and piece.label in text
        assert ("with drums" in text) == any(n.channel == midi.DRUMS for n in piece.phrase.notes)
        keys = [n.key for n in piece.phrase.notes if n.channel == 0]
        if "rising scale" in text:
            assert keys == sorted(keys)
        if "falling scale" in text:
            assert keys == sorted(keys, reverse=True)
        if "note" in text.split():
            assert len(keys) == 1


def test_fast_has_more_notes_than_slow():
    count: dict[str, list[int]] = {"slow": [], "fast": []}
    for k in range(300):
        piece = music.play(music.INSTRUMENTS[0], random.Random(k))
        for word, counts in count.items():
            if word in piece.captions[0] and "melody" in piece.captions[0]:
                counts.append(sum(n.channel == 0 for n in piece.phrase.notes))
    assert np.mean(count["fast"]) > 1.8 * np.mean(count["slow"])


def test_every_word_is_spoken_once_by_each_voice_at_each_stretch():
    items = list(speech.spoken())
    assert len(items) == len(set(items)) == 4 * (2 * len(speech.WORDS) + 4 * len(speech.DIGITS))
    assert len(set(speech.WORDS) | set(speech.DIGITS)) == len(speech.WORDS) + len(speech.DIGITS)
    assert items[0].captions == ("the word zero, female voice", "a woman says zero")


def test_trimming_keeps_the_loud_part():
    sound = np.zeros(16000, np.float32)
    sound[5000:6000] = 1
    assert len(speech.trim(sound)) == 1000 + 320 + 960 - 1
    assert len(speech.trim(np.zeros(10, np.float32))) == 10


def test_effect_names_become_words():
    assert effects.caption("drum_cowbell") == "cowbell"
    assert effects.caption("elec_blip2") == "electronic percussion sound"
    assert effects.caption("bd_808") == "electronic bass drum"
    assert effects.caption("unheard_of") is None


def test_missing_programs_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install fluidsynth"):
        midi.render([midi.Phrase((), ())], Path("font.sf2"), 1.0)
    with pytest.raises(ConfigError, match="apt-get install flite"):
        speech.speak(next(speech.spoken()))


def test_sheet_shows_sounds_in_order(tmp_path, monkeypatch):
    for k, frequency in enumerate((300.0, 5000.0)):
        write(Sound(tone(frequency)[0].numpy(), RATE), tmp_path / f"{k}.wav", {})
    monkeypatch.setattr("sys.argv", ["sheet", str(tmp_path), "-o", str(tmp_path / "s.png"), "--columns", "2"])
    sheet.main()
    with Image.open(tmp_path / "s.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (BANDS + 2, 2 * (FRAMES + 2))
    low, high = (int(pixels[:BANDS, column].argmax()) for column in (64, FRAMES + 2 + 64))
    assert low > 60 and high < 20  # rows are counted from the top
    monkeypatch.setattr("sys.argv", ["sheet", str(tmp_path / "s.png"), "-o", "x.png"])
    with pytest.raises(ConfigError, match="has no files"):
        sheet.main()
