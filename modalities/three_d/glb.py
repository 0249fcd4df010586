"""Binary glTF 2.0 of one mesh with vertex colours: what a viewer shows is what the renderer showed.

glTF means linear values by COLOR_0 (3.7.2.1 of the specification), and its default material is a metal under the
viewer's lamps (3.9.2). Here light is in the colours already, as sRGB. So they are converted, and the material is unlit
(KHR_materials_unlit); viewers that do not know the extension get a dull one that is no metal.
Axes and units are glTF's own: y up, front towards +z, metres.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from suite.modalities.three_d.colours import linear

if TYPE_CHECKING:
    from trimesh import Trimesh

GENERATOR = "efficient-diffusion-suite"
UNLIT = "KHR_materials_unlit"
MATERIAL: Mapping[str, Any] = {
    "name": "unlit vertex colours",
    "pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, 1], "metallicFactor": 0, "roughnessFactor": 1},
    "extensions": {UNLIT: {}},
}
FLOAT, INDEX = 5126, 5125
ARRAY, ELEMENTS = 34962, 34963
"""Component types float and unsigned int, buffer targets of attributes and of indices."""


def binary(mesh: Trimesh, colours: NDArray[np.uint8], extras: Mapping[str, Any]) -> bytes:
    """The file's content; `colours` are sRGB [V, 3], `extras` what `asset` says besides. Equal input, equal bytes."""
    vertices = np.asarray(mesh.vertices, "<f4")
    shape = {"type": "VEC3", "componentType": FLOAT, "count": len(vertices)}
    normals = np.asarray(mesh.vertex_normals, np.float64)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.where(length > 0, normals / np.maximum(length, 1e-12), [0.0, 1.0, 0.0])  # unit length is a must
    faces = np.asarray(mesh.faces, "<u4")
    parts: list[tuple[NDArray[Any], int, dict[str, Any]]] = [
        (vertices, ARRAY, {**shape, "min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()}),
        (normals.astype("<f4"), ARRAY, dict(shape)),
        (linear(colours / 255.0).astype("<f4"), ARRAY, dict(shape)),  # bytes would lose the dark half
        (faces, ELEMENTS, {"type": "SCALAR", "componentType": INDEX, "count": faces.size}),
    ]
    views, accessors, content = [], [], b""
    for index, (values, target, accessor) in enumerate(parts):
        views.append({"buffer": 0, "byteOffset": len(content), "byteLength": values.nbytes, "target": target})
        accessors.append({"bufferView": index, **accessor})
        content += values.tobytes()
    primitive = {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0, "mode": 4}
    tree = {
        "asset": {"version": "2.0", "generator": GENERATOR, "extras": extras},
        "extensionsUsed": [UNLIT],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "object", "mesh": 0}],
        "meshes": [{"name": "object", "primitives": [primitive]}],
        "materials": [MATERIAL],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(content)}],
    }
    said = json.dumps(tree, separators=(",", ":")).encode("ascii")
    chunks = _chunk(b"JSON", said, b" ") + _chunk(b"BIN\0", content, b"\0")
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _chunk(kind: bytes, content: bytes, fill: bytes) -> bytes:
    content += fill * (-len(content) % 4)
    return struct.pack("<I4s", len(content), kind) + content
