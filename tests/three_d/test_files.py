"""Mesh files, read as their formats' specifications say: the colours that a viewer shows are the renderer's."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trimesh", reason="the extra `3d` is not installed")

import torch
import trimesh

from suite.modalities.three_d import files
from suite.modalities.three_d.camera import ring
from suite.modalities.three_d.pictures import render

COMPONENTS = {5126: "<f4", 5125: "<u4"}
WIDTHS = {"SCALAR": 1, "VEC3": 3}


@pytest.fixture
def mesh() -> Any:
    """A ball of random colours; the first vertices have all grey levels in turn."""
    ball = trimesh.creation.icosphere(3, radius=0.5)
    colours = np.random.default_rng(0).integers(0, 256, (len(ball.vertices), 4)).astype(np.uint8)
    colours[:256, :3] = np.arange(256)[:, None]
    colours[:, 3] = 255
    ball.visual = trimesh.visual.ColorVisuals(ball, vertex_colors=colours)
    return ball


def glb(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON chunk, and the arrays of the only primitive; every length and alignment that glTF 2.0 demands."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    tree, rest = json.loads(data[20 : 20 + size]), data[20 + size :]
    size, kind = struct.unpack_from("<I4s", rest)
    assert kind == b"BIN\0" and size % 4 == 0 and len(rest) == 8 + size
    assert 0 <= size - tree["buffers"][0]["byteLength"] < 4
    (primitive,) = tree["meshes"][0]["primitives"]
    arrays = {}
    for name, index in {**primitive["attributes"], "indices": primitive["indices"]}.items():
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0 and view["target"] == (34963 if name == "indices" else 34962)
        values = np.frombuffer(
            rest[8 + view["byteOffset"] :][: view["byteLength"]], COMPONENTS[accessor["componentType"]]
        )
        assert len(values) == accessor["count"] * WIDTHS[accessor["type"]]
        arrays[name] = values.reshape(-1, WIDTHS[accessor["type"]]).astype(np.float64)
        if "min" in accessor:
            np.testing.assert_array_equal(np.float32([values.reshape(-1, 3).min(0), values.reshape(-1, 3).max(0)]),
                                          np.float32([accessor["min"], accessor["max"]]))  # fmt: skip
    assert "min" in tree["accessors"][primitive["attributes"]["POSITION"]]
    return tree, arrays


def shown(linear: np.ndarray) -> np.ndarray:
    """The sRGB levels of linear values, by the standard's own formula."""
    curve = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear.ravel()]
    return (np.reshape(curve, linear.shape) * 255).round().astype(np.uint8)


def test_a_glb_shows_the_renderers_colours(mesh, tmp_path) -> None:
    files.write(mesh, path := tmp_path / "a.glb", {"seed": 1})
    tree, arrays = glb(path)
    # 3.9.2 and KHR_materials_unlit: what is shown is baseColorFactor x COLOR_0, both linear, and no light.
    (material,) = tree["materials"]
    assert tree["meshes"][0]["primitives"][0]["material"] == 0
    assert material["extensions"] == {"KHR_materials_unlit": {}} and tree["extensionsUsed"] == ["KHR_materials_unlit"]
    assert "extensionsRequired" not in tree
    surface = material["pbrMetallicRoughness"]
    assert (surface["metallicFactor"], surface["roughnessFactor"]) == (0, 1)
    assert surface["baseColorFactor"] == [1, 1, 1, 1]
    own = np.asarray(mesh.visual.vertex_colors)[:, :3]
    np.testing.assert_array_equal(shown(arrays["COLOR_0"]), own)
    assert arrays["COLOR_0"][128, 0] == pytest.approx(((128 / 255 + 0.055) / 1.055) ** 2.4, abs=1e-6)
    # The same object in the same place, with faces that look outward, and a picture of it is the modality's own.
    np.testing.assert_allclose(arrays["POSITION"], mesh.vertices, atol=1e-6)
    np.testing.assert_array_equal(arrays["indices"].reshape(-1, 3), mesh.faces)
    np.testing.assert_allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1, atol=1e-5)
    assert ((arrays["NORMAL"] * arrays["POSITION"]).sum(1) > 0).all()
    again = trimesh.Trimesh(arrays["POSITION"], arrays["indices"].reshape(-1, 3).astype(int), process=False)
    again.visual = trimesh.visual.ColorVisuals(again, vertex_colors=shown(arrays["COLOR_0"]))
    cameras = ring(2, math.radians(20))
    torch.testing.assert_close(render(again, cameras, 32), render(mesh, cameras, 32), atol=1e-4, rtol=0)
    assert files.read_metadata(path) == {"seed": 1}


def test_another_reader_sees_the_same_glb(mesh, tmp_path) -> None:
    files.write(mesh, path := tmp_path / "a.glb", {})
    (loaded,) = trimesh.load(path).geometry.values()
    assert loaded.is_watertight and loaded.volume > 0
    material = loaded.visual.material
    assert (material.metallicFactor, material.roughnessFactor) == (0, 1)
    colours = np.asarray(loaded.visual.vertex_attributes["color"])[:, :3]
    np.testing.assert_array_equal(shown(colours), np.asarray(mesh.visual.vertex_colors)[:, :3])


@pytest.mark.parametrize("suffix", [".obj", ".ply"])
def test_obj_and_ply_hold_srgb_colours_and_outward_normals(mesh, tmp_path, suffix) -> None:
    files.write(mesh, path := tmp_path / f"a{suffix}", {"seed": 1})
    loaded = trimesh.load(path, process=False)
    own = np.asarray(mesh.visual.vertex_colors)[:, :3]
    np.testing.assert_array_equal(np.asarray(loaded.visual.vertex_colors)[:, :3], own)
    np.testing.assert_allclose(loaded.vertices, mesh.vertices, atol=1e-6)
    assert ((loaded.vertex_normals * loaded.vertices).sum(1) > 0).all()
    if suffix == ".obj":  # x y z r g b, colours from 0 to 1
        first = next(line for line in path.read_text().splitlines() if line.startswith("v "))
        assert np.round(np.float64(first.split()[4:]) * 255).astype(int).tolist() == own[0].tolist()
    assert files.read_metadata(path) == {"seed": 1}
