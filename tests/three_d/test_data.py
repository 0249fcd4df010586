"""The furniture archive, its views and captions, the training file, and a few steps of training on it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from suite.errors import ConfigError
from suite.host.models import ModelFolder
from suite.modalities.shared.fetch import Archive
from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.three_d import ThreeD
from suite.modalities.three_d.camera import HIGH, LOW, Cameras, token
from suite.modalities.three_d.data import VIEWS, cameras_for, colour_name, load, prepare
from suite.modalities.three_d.metrics import of_views
from suite.modalities.three_d.sources import read_furniture
from suite.modalities.three_d.training import ViewTraining, make_batches, train
from suite.training.config import read_training

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "three_d" / "samples.safetensors"
RECIPES = ROOT / "configs" / "training"

BOX = """mtllib box.mtl
v 10 0 0
v 12 0 0
v 12 1 0
v 10 1 0
v 10 0 1
v 12 0 1
v 12 1 1
v 10 1 1
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl {name}
f 1/1 4/4 3/3 2/2
f 5/1 6/2 7/3 8/4
usemtl plain
f 1 2 6 5
f 4 8 7 3
f 1 5 8 4
f 2 3 7 6
"""
MATERIALS = """newmtl {name}
Kd 1 1 1
map_Kd Wood.PNG
newmtl plain
Kd 0.0 0.0 0.8
"""
ENTRY = """id#{n}=box{n}
name#{n}={name}
tags#{n}=Blend Swap, Storage
category#{n}=Bedroom
icon#{n}=/x/box.png
model#{n}=/box{n}/box.obj
width#{n}={width}
depth#{n}=100
height#{n}=50
creator#{n}=Somebody
{more}
"""


def encoder(prompts, length):
    states, mask = torch.zeros(len(prompts), length, 384), torch.zeros(len(prompts), length)
    for row, prompt in enumerate(prompts):
        count = min(length, 2 + len(prompt.split()))
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
        states[row, :count] = torch.randn(count, 384, generator=torch.Generator().manual_seed(seed))
        mask[row, :count] = 1
    return TokenStates(states, mask)


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def deb(path: Path, licence: str) -> None:
    """A Debian package that holds one catalogue of three models, the last under `licence`."""
    inner = io.BytesIO()
    names = ["Bo\\u00eete", "Chest", "Trunk"]
    with zipfile.ZipFile(inner, "w") as box:
        entries = [
            ENTRY.format(n=n, name=name, width=200, more="modelRotation#2=0 0 1 0 1 0 -1 0 0" if n == 2 else "")
            for n, name in enumerate(names, 1)
        ]
        box.writestr("PluginFurnitureCatalog.properties", "\n".join(entries))
        for n in (1, 2, 3):
            box.writestr(f"box{n}/box.obj", BOX.format(name="oakwood"))
            box.writestr(f"box{n}/box.mtl", MATERIALS.format(name="oakwood"))
            box.writestr(f"box{n}/wood.png", picture((200, 20, 20)))
        box.writestr("box3/LICENSE.txt", licence)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        item = tarfile.TarInfo("./usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f")
        item.size = len(inner.getvalue())
        tar.addfile(item, io.BytesIO(inner.getvalue()))
    content = data.getvalue()
    head = f"{'data.tar':<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(content):<10}`\n".encode()
    path.write_bytes(b"!<arch>\n" + head + content)


@pytest.fixture
def cache(tmp_path):
    deb(tmp_path / "apt-furniture-1.deb", "This work is under CC-BY-SA 3.0")
    return tmp_path


FURNITURE = Archive("apt", "furniture", "1", "CC0")


def test_models_are_read_turned_stretched_and_licensed(cache):
    items = list(read_furniture(cache / "apt-furniture-1.deb"))
    assert [item.name for item in items] == ["Boîte", "Chest"]  # the third is share-alike
    plain, turned = (item.surface for item in items)
    assert items[0].licence == "CC0 1.0" and any("oakwood" in m for m in items[0].materials)
    for surface in (plain, turned):
        extent = surface.vertices.max(0) - surface.vertices.min(0)
        np.testing.assert_allclose(extent / extent[1], [4, 1, 2], rtol=1e-5)
        assert np.linalg.norm(surface.vertices, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert {-1, 0} == set(plain.texture.tolist())
    np.testing.assert_allclose(plain.textures[0][0, 0], np.array([200, 20, 20]) / 255, atol=1e-6)


def test_prepare_writes_a_file_that_load_reads(cache):
    target = prepare(cache, 32, encoder=encoder, archive=FURNITURE, expected=2)
    assert target.name == "3d-32.safetensors"
    data = load(target)
    assert data.pictures.shape == (2, VIEWS, 3, 32, 32) and data.cameras.shape == (2, VIEWS, 2)
    assert data.captions[0] == "" and "a wooden boîte" in data.captions and "a blue chest" in data.captions
    assert data.about["credits"] == ["Boîte by Somebody (CC0 1.0)", "Chest by Somebody (CC0 1.0)"]
    first = target.read_bytes()
    assert prepare(cache, 32, encoder=encoder, archive=FURNITURE, expected=2).read_bytes() == first


def test_prepare_refuses(cache):
    with pytest.raises(ConfigError, match="expected 16 to 256"):
        prepare(cache, 8, encoder=encoder, archive=FURNITURE, expected=2)
    with pytest.raises(ConfigError, match="gave 2 objects, expected 3"):
        prepare(cache, 32, encoder=encoder, archive=FURNITURE, expected=3)
    with pytest.raises(ConfigError, match="smaller size"):
        prepare(cache, 32, encoder=encoder, archive=FURNITURE, expected=2, limit=1000)
    assert not list(cache.glob("*.safetensors"))


def test_cameras_stand_all_around_and_depend_on_the_object_alone():
    one, again, other = cameras_for(3), cameras_for(3), cameras_for(4)
    assert torch.equal(one.azimuth, again.azimuth) and not torch.equal(one.azimuth, other.azimuth)
    assert one.elevation.min() >= LOW and one.elevation.max() <= HIGH
    sectors = (one.azimuth / (2 * math.pi / (VIEWS // 2))).round().long() % (VIEWS // 2)
    assert sectors.bincount().tolist() == [2] * (VIEWS // 2)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((200, 20, 20), "red"), ((30, 60, 200), "blue"), ((110, 70, 40), "brown"), ((10, 10, 10), "black"),
     ((120, 120, 125), "grey"), ((40, 150, 60), "green"), ((225, 205, 175), "beige"), ((230, 210, 60), "yellow")],
)  # fmt: skip
def test_colours_have_their_names(rgb, name):
    assert colour_name(np.full((1, 8, 8, 3), rgb, np.uint8)) == name
    assert colour_name(np.full((1, 8, 8, 3), 255, np.uint8)) == "white"


def test_the_samples_are_real_views():
    data = load(SAMPLES)
    assert len(data) == 8 and data.size == 64 and "a brown barrel" in data.captions
    assert all("CC0" in credit for credit in data.about["credits"])
    shares = (data.pictures < 250).any(2).float().mean((2, 3))
    assert shares.min() > 0.01 and shares.max() < 0.7
    assert data.pictures[:, :, :, 0, 0].eq(255).all()


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "3d-64.safetensors"
    with pytest.raises(ConfigError, match="suite data prepare 3d"):
        load(path)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        load(path)


def small(tmp_path, **changes):
    text = {
        "name": "t", "network": "transformer", "shape": [3, 64, 64], "batch": 4, "text_length": 12,
        "model": {"sample_size": 64, "patch_size": 16, "in_channels": 3, "out_channels": 3, "num_layers": 1,
                  "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
                  "caption_channels": 384, "norm_type": "ada_norm_single", "use_additional_conditions": False},
        "sheet": ["a barrel"],
        "train": {"steps": 2, "optimizer": "muon", "warmup": 1, "compile": False, "precision": "fp32"},
    }  # fmt: skip
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(text | changes))
    return path


def test_a_mirrored_view_is_seen_from_the_other_side(tmp_path):
    config = read_training(ViewTraining, small(tmp_path))
    batches = make_batches(load(SAMPLES), config, torch.device("cpu"))
    x0, text = batches.draw(64, 0.5, torch.Generator().manual_seed(0))
    views = batches.pictures.flatten(0, 1).float() / 127.5 - 1
    both = torch.cat([views, views.flip(-1)])
    azimuth, elevation = batches.cameras.flatten(0, 1).unbind(-1)
    tokens = token(Cameras(torch.cat([azimuth, -azimuth]), torch.cat([elevation, elevation])), 384)
    index = torch.cdist(x0.flatten(1), both.flatten(1)).argmin(1)
    torch.testing.assert_close(text.states[:, -1], tokens[index], atol=1e-5, rtol=0)
    assert (index >= len(views)).any() and (index < len(views)).any()
    assert text.mask[:, -1].eq(1).all()
    empty = text.mask[:, :-1].sum(1) == 2  # dropped captions: begin and end marks alone
    assert 10 < int(empty.sum()) < 54


def test_two_steps_give_a_model_folder_that_generates(tmp_path):
    folder = train(small(tmp_path), SAMPLES, tmp_path / "run")
    assert (tmp_path / "run" / "samples-000002.png").is_file()
    facts = json.loads((folder / "suite.json").read_text())
    assert (facts["modality"], facts["camera"]) == ("3d", "token")
    opened = ThreeD(ModelFolder(folder, facts), "cpu", torch.float32)
    assert opened.told and opened.network.layout.tokens == 16


def test_training_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="no caption 'a dragon'"):
        train(small(tmp_path, sheet=["a dragon"]), SAMPLES, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"start: the network of emoji-64 is not the one"):
        train(small(tmp_path, start="emoji-64"), SAMPLES, tmp_path / "run")
    with pytest.raises(ConfigError, match="unknown key"):
        train(small(tmp_path, stort="emoji-64"), SAMPLES, tmp_path / "run")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("3d-*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_begin_as_the_image_model(recipe):
    config = read_training(ViewTraining, recipe)
    from suite.modalities.image.training import build
    from suite.modalities.three_d.training import begin_with

    network = build(config)
    before = network.proj_out.weight.clone()
    begin_with(network, config)
    assert not torch.equal(before, network.proj_out.weight)


def test_metrics_know_real_objects_from_mixed_ones():
    data = load(SAMPLES)
    views = data.pictures.float() / 255
    names = [data.captions[row[0]] for row in data.captions_of().tolist()]
    real = of_views(views, names)
    mixed = of_views(views.transpose(0, 1).contiguous(), names)  # each "object" is a view of every object
    assert real["consistency"] > 0.2 > mixed["consistency"] + 0.1
    assert real["r_at_1"] > 2 / 8 and real["r_at_5"] > real["r_at_1"]
    harder = of_views(views, names, [f"a {word}" for word in ("cat", "dog", "cake", "star", "moon", "fish")])
    assert harder["r_at_1"] <= real["r_at_1"] and harder["alignment"] == pytest.approx(real["alignment"], abs=1e-6)
    with pytest.raises(ConfigError, match="expected one prompt"):
        of_views(views, names[:3])
    with pytest.raises(ConfigError, match="shape"):
        of_views(views[0], names)
