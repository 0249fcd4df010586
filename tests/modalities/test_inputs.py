"""Files to begin with are taken as a viewer or a player shows them; the right values are made here."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from suite.errors import ConfigError
from suite.modalities.image import Image as ImageModality
from suite.modalities.shared.pictures import as_seen

ORIENTATION = 0x0112


def corners() -> Image.Image:
    """6 x 4: red at the top left, green at the top right, blue at the bottom left, white elsewhere."""
    picture = Image.new("RGB", (6, 4), "white")
    for place, colour in (((0, 0), "red"), ((5, 0), "green"), ((0, 3), "blue")):
        picture.putpixel(place, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))  # pyright: ignore[reportArgumentType]
    return picture


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path, tag: int, suffix: str) -> None:
    """EXIF 2.32, 4.6.5: 1 upright, 2 mirrored, 3 upside down, 5 to 8 on their side."""
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[tag]  # fmt: skip
    seen = np.kron(np.asarray(corners()), np.ones((16, 16, 1), np.uint8))  # whole blocks of a JPEG
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    options = {".png": {}, ".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}[suffix]
    Image.fromarray(np.ascontiguousarray(stored(seen))).save(path := tmp_path / f"a{suffix}", exif=exif, **options)
    got = pixels(ImageModality.read(path))
    assert got.shape == seen.shape and np.abs(got - seen).max() <= (3 if suffix == ".jpg" else 0)


def png(colour_type: int, rows: np.ndarray, path: Path, **chunks: bytes) -> Path:
    """A PNG of 16 bits a channel, by the specification: Pillow writes grey ones only."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = rows.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    more = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return path


def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535], [300, 1000, 40000, 65000]], np.uint16)
    wanted = (levels / 257).round()
    grey = pixels(ImageModality.read(png(0, levels, tmp_path / "grey.png")))
    assert np.abs(grey - wanted[..., None]).max() == 0
    colour = np.stack([levels, levels[::-1], levels[:, ::-1]], -1)
    got = pixels(ImageModality.read(png(2, colour, tmp_path / "rgb.png")))
    assert np.abs(got - colour / 257).max() <= 1  # Pillow keeps the upper byte
    key = pixels(ImageModality.read(png(0, levels, tmp_path / "key.png", tRNS=struct.pack(">H", 300))))
    assert key[1, 0].tolist() == [255] * 3 and np.abs(key[0] - wanted[0][:, None]).max() == 0
    alpha = np.stack([levels, np.full_like(levels, 65535)], -1)
    alpha[0, 0, 1] = 0
    got = pixels(ImageModality.read(png(4, alpha, tmp_path / "la.png")))
    assert got[0, 0].tolist() == [255] * 3 and np.abs(got[1] - wanted[1][:, None]).max() <= 1


def test_palettes_keys_and_premultiplied_opacity_lie_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 100])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=bytes([128, 255]))
    got = pixels(ImageModality.read(tmp_path / "p.png"))
    assert np.abs(got[0] - [[227, 127, 127], [0, 0, 100]]).max() <= 1
    keyed = Image.new("RGB", (2, 1), (9, 9, 9))
    keyed.putpixel((1, 0), (50, 60, 70))
    keyed.save(tmp_path / "k.png", transparency=(9, 9, 9))
    assert pixels(ImageModality.read(tmp_path / "k.png"))[0].tolist() == [[255] * 3, [50, 60, 70]]
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert np.abs(pixels(as_seen(half.convert("RGBa"))) - pixels(half)).max() <= 1
    assert [as_seen(Image.new(m, (1, 1))).mode for m in ("1", "L", "LA", "La", "CMYK", "YCbCr", "LAB", "F")] == [
        "RGBA"
    ] * 8


def test_cmyk_is_ink(tmp_path: Path) -> None:
    """Adobe's JPEG stores it inverted; Pillow writes and reads the mark that says so."""
    ink = Image.merge("CMYK", [Image.new("L", (32, 32), level) for level in (255, 0, 0, 0)])
    ink.save(tmp_path / "c.jpg", quality=100)
    got = pixels(ImageModality.read(tmp_path / "c.jpg"))
    assert np.abs(got - [0, 255, 255]).max() <= 3


def test_colours_are_converted_by_their_profile(tmp_path: Path) -> None:
    """A profile whose grey has gamma 1 (linear): half the light is sRGB 188."""
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey.save(tmp_path / "same.png", icc_profile=lab)
    assert np.abs(pixels(ImageModality.read(tmp_path / "same.png")) - 128).max() <= 1
    grey.save(tmp_path / "linear.png", icc_profile=linear_profile(lab))
    assert np.abs(pixels(ImageModality.read(tmp_path / "linear.png")) - 188).max() <= 1
    layers = grey.convert("RGBA")
    layers.putalpha(0)
    layers.save(tmp_path / "clear.png", icc_profile=linear_profile(lab))
    assert (pixels(ImageModality.read(tmp_path / "clear.png")) == 255).all()
    grey.save(tmp_path / "damaged.png", icc_profile=b"\0" * 200)
    assert (pixels(ImageModality.read(tmp_path / "damaged.png")) == 128).all()


def linear_profile(profile: bytes) -> bytes:
    """The same profile with curves of gamma 1: a `curv` of no entries (ICC.1, 10.6)."""
    count = struct.unpack_from(">I", profile, 128)[0]
    changed = bytearray(profile)
    for index in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            changed[offset : offset + 12] = b"curv\0\0\0\0" + struct.pack(">I", 0)
    return bytes(changed)


def test_the_first_frame_of_several_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (pixels(ImageModality.read(tmp_path / name)) == [255, 0, 0]).all()


@pytest.mark.parametrize("times", [1.5, 3])
def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """Pillow warns above its limit and raises above twice of it; here both are one error."""
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png", pnginfo=PngImagePlugin.PngInfo())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / times))
    for read in (ImageModality.read, ImageModality.read_metadata):
        with pytest.raises(ConfigError, match=r"big\.png has more than the [\d,]+ pixels"):
            read(tmp_path / "big.png")


def test_a_damaged_picture_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    corners().resize((60, 40)).save(content, "PNG")
    for name, data in (("cut.png", content.getvalue()[:-60]), ("text.png", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name} is not a readable picture"):
            ImageModality.read(tmp_path / name)


# ---- clips ---------------------------------------------------------------------------------------


def mp4(path: Path, frames: list[np.ndarray], pixels: str = "yuv420p", times: list[int] | None = None) -> Path:
    """Frames of equal size at 10 a second, or at `times` in tenths of a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = (times or list(range(len(frames))))[index]
            box.mux(stream.encode(picture))
        box.mux(stream.encode())
    return path


def quarters(height: int = 64, width: int = 96) -> np.ndarray:
    """Red at the top left, blue at the bottom right, grey elsewhere."""
    out = np.full((height, width, 3), 128, np.uint8)
    out[: height // 2, : width // 2] = (200, 0, 0)
    out[height // 2 :, width // 2 :] = (0, 0, 200)
    return out


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_a_clip_is_turned_as_its_display_matrix_says(tmp_path: Path, turned: int) -> None:
    """ISO 14496-12, 8.3.2: (x, y) -> (a x + c y, b x + d y) with y down, so 0 1 -1 0 turns clockwise."""
    from suite.modalities.video.reading import shown

    path = mp4(tmp_path / "a.mp4", [quarters()] * 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turned]
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    got = shown(path).frames[0, ..., :3].astype(int)
    wanted = np.rot90(quarters(), -turned // 90)
    assert got.shape == wanted.shape and np.abs(got - wanted).mean() < 6


@pytest.mark.parametrize("layout", ["yuv420p", "yuv444p", "yuv422p10le"])
def test_other_pixel_formats_are_the_same_picture(tmp_path: Path, layout: str) -> None:
    from suite.modalities.video.reading import shown

    got = shown(mp4(tmp_path / "a.mp4", [quarters()] * 2, layout)).frames
    assert got.shape == (2, 64, 96, 4) and (got[..., 3] == 255).all()
    assert np.abs(got[0, ..., :3].astype(int) - quarters()).mean() < 6


def test_frames_stand_as_long_as_they_are_shown(tmp_path: Path) -> None:
    from suite.modalities.video.reading import shown

    greys = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 100, 200)]
    for name in ("a.gif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        greys[0].save(
            tmp_path / name, save_all=True, append_images=greys[1:], duration=[300, 100, 400], loop=0, **options
        )
        clip = shown(tmp_path / name)
        assert clip.length == pytest.approx(0.8) and clip.evenly(8)[:, 0, 0, 0].tolist() == [0, 0, 0, 100, *[200] * 4]
    levels = [np.full((16, 16, 3), level, np.uint8) for level in (0, 100, 200)]
    clip = shown(mp4(tmp_path / "a.mp4", levels, times=[0, 3, 4]))
    assert clip.length == pytest.approx(0.5, abs=0.02)
    assert np.abs(clip.evenly(5)[:, 8, 8, 0].astype(int) - [0, 0, 0, 100, 200]).max() < 4


def test_a_clip_of_the_suite_keeps_its_frames(tmp_path: Path) -> None:
    """Rounded to hundredths of a second in a GIF, every one of them is still shown once."""
    from suite.modalities.video.files import Clip, save
    from suite.modalities.video.reading import shown

    colour = np.zeros((24, 8, 8, 3), np.uint8)
    colour[:] = (np.arange(24) * 10)[:, None, None, None]
    for rate in (8.0, 12.0, 23.0):
        for name in ("a.gif", "a.webp", f"{rate:g}.frames"):
            save(Clip(colour, np.full((24, 8, 8), 255, np.uint8), rate), tmp_path / name, {})
            assert shown(tmp_path / name).evenly(24)[:, 0, 0, 0].tolist() == [k * 10 for k in range(24)]


def test_large_and_long_clips_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suite.modalities.video import reading

    frames = [Image.new("RGB", (600, 1300), (k, 0, 0)) for k in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert reading.shown(tmp_path / "a.gif").frames.shape == (3, 650, 300, 4)
    monkeypatch.setattr(reading, "MOST", 650 * 300 * 2)
    with pytest.raises(ConfigError, match=r"a\.gif is too long: 2 frames"):
        reading.shown(tmp_path / "a.gif")
    (tmp_path / "b.frames").mkdir()
    with pytest.raises(ConfigError, match="has no frame"):
        reading.shown(tmp_path / "b.frames")


# ---- sounds --------------------------------------------------------------------------------------

soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_every_width_and_any_number_of_channels(tmp_path: Path, subtype: str, channels: int) -> None:
    from suite.modalities.audio import Audio

    wave = 0.5 * np.sin(np.arange(2000) / 7)
    shares = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)  # of mean 1
    soundfile.write(tmp_path / "a.wav", wave[:, None] * shares, 22255, subtype=subtype)
    got = Audio.read(tmp_path / "a.wav")
    error = {"PCM_U8": 1 / 100, "PCM_16": 1e-4, "ULAW": 0.03}.get(subtype, 1e-6)
    assert got.rate == 22255 and np.abs(got.samples - wave).max() < error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    from suite.modalities.audio import Audio

    wave = np.zeros((100, 2), np.float32)
    wave[40, 1] = value
    soundfile.write(tmp_path / "a.wav", wave, 100, subtype="FLOAT")
    with pytest.raises(ConfigError, match=r"a\.wav has 1 samples that are no numbers, the first at 0\.4 s"):
        Audio.read(tmp_path / "a.wav")


def test_a_sound_is_clipped_as_a_player_does_and_an_empty_one_refused(tmp_path: Path) -> None:
    from suite.modalities.audio import Audio

    soundfile.write(tmp_path / "loud.wav", np.float32([0.5, 3, -9]), 8000, subtype="FLOAT")
    assert Audio.read(tmp_path / "loud.wav").samples.tolist() == [0.5, 1, -1]
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    with pytest.raises(ConfigError, match="0 samples"):
        Audio.read(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 60), 8000)
    assert Audio.read(tmp_path / "long.wav").seconds == 3  # no more of it is listened to


@pytest.mark.parametrize("rate", [4001, 11_025, 22_255, 44_100, 192_000])
def test_odd_rates_keep_their_pitch(rate: int) -> None:
    """A tone of 440 Hz stays one: 440 periods a second, to 1 in 1,000."""
    from suite.modalities.audio.files import Sound, at_rate

    samples = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    got = at_rate(Sound(samples, rate), 16_000)
    assert got.rate == 16_000 and got.seconds == pytest.approx(2, rel=1e-3)
    middle = got.samples[1600:-1600]
    rising = np.nonzero((middle[:-1] < 0) & (middle[1:] >= 0))[0]
    crossing = rising - middle[rising] / (middle[rising + 1] - middle[rising])
    assert 16_000 / np.diff(crossing).mean() == pytest.approx(440, rel=3e-4)


def test_a_rate_of_nothing_to_hear_is_refused() -> None:
    from suite.modalities.audio.files import Sound, at_rate

    with pytest.raises(ConfigError, match="100 or more"):
        at_rate(Sound(np.ones(5, np.float32), 7), 16_000)
