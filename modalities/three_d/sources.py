"""The furniture catalogue of Sweet Home 3D: licensed meshes with names, tags and real sizes, as `Item`s.

Five collections, 820 models, CC0 or CC-BY 3.0. A model whose own licence file speaks of share-alike or
non-commercial terms would be left out; at the version named here there is none.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from suite.errors import ConfigError
from suite.modalities.shared.fetch import Archive, members

FURNITURE = Archive(
    "apt",
    "sweethome3d-furniture",
    "1.8-1",
    "CC0 and CC-BY 3.0",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
)
EXPECTED = 800
"""Models that the archive must give."""
LICENCES = {
    "BlendSwap-CC-0": "CC0 1.0",
    "BlendSwap-CC-BY": "CC-BY 3.0",
    "KatorLegaz": "CC-BY 3.0 US",
    "Reallusion": "CC-BY 3.0 US",
    "Scopia": "CC-BY 3.0",
}
_REFUSED = re.compile(r"share-?alike|non-?commercial|\bby-(sa|nc|nd)|\bGPL", re.IGNORECASE)
_TEXTURE = 64
"""Textures are averaged down to this side: a picture of an object has no more pixels than that."""


@dataclass(frozen=True)
class Surface:
    """A coloured triangle mesh inside the unit ball.

    `vertices` float32 [V, 3]; `faces` int64 [F, 3]; `colours` float32 [F, 3, 3] in [0, 1], one a corner;
    `uv` float32 [F, 3, 2] and `texture` int64 [F], the index into `textures` (float32 [H, W, 3]) or -1 for none.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int64]
    colours: NDArray[np.float32]
    uv: NDArray[np.float32]
    texture: NDArray[np.int64]
    textures: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """One model of the catalogue: `name` and `tags` as the catalogue spells them, `materials` from its files."""

    collection: str
    identity: str
    name: str
    tags: tuple[str, ...]
    category: str
    creator: str
    materials: tuple[str, ...]
    surface: Surface = field(repr=False)

    @property
    def licence(self) -> str:
        return LICENCES[self.collection]


def read_furniture(path: Path, most: int | None = None) -> Iterator[Item]:
    """The models of the archive in the order of its catalogues; those that cannot be read are skipped."""
    seen = 0
    for name, data in sorted(members(path, r"/furniture/[^/]+\.sh3f$")):
        collection = PurePosixPath(name).stem
        if collection not in LICENCES:
            continue
        with zipfile.ZipFile(io.BytesIO(data)) as box:
            for entry in _catalogue(box):
                if most is not None and seen >= most:
                    return
                if item := _item(box, collection, entry):
                    seen += 1
                    yield item


def _catalogue(box: zipfile.ZipFile) -> list[dict[str, str]]:
    """Java properties `key#number=value` -> one mapping a number."""
    text = box.read("PluginFurnitureCatalog.properties").decode("latin-1")
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*?)\s*$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value
    return [entries[number] for number in sorted(entries)]


def _item(box: zipfile.ZipFile, collection: str, entry: Mapping[str, str]) -> Item | None:
    model = entry["model"].lstrip("/")
    folder = str(PurePosixPath(model).parent) + "/"
    files = {n.lower(): n for n in box.namelist() if n.startswith(folder)}
    texts = [n for n in files.values() if "licen" in n.lower() or n.lower().endswith(("readme.txt", "copyright.txt"))]
    if any(_REFUSED.search(re.sub(r"<[^>]*>", " ", box.read(n).decode("latin-1"))) for n in texts):
        return None
    loaded = _load(box, model, files)
    if loaded is None:
        return None
    surface, materials = loaded
    turned = _placed(surface, entry)
    tags = tuple(t.strip() for t in entry.get("tags", "").split(",") if t.strip())
    return Item(
        collection,
        entry.get("id", model),
        entry["name"],
        tags,
        entry.get("category", ""),
        entry.get("creator", ""),
        materials,
        turned,
    )


def _load(box: zipfile.ZipFile, model: str, files: Mapping[str, str]) -> tuple[Surface, tuple[str, ...]] | None:
    trimesh = _trimesh()

    class Resolver(trimesh.resolvers.Resolver):
        """Files beside the model; names differ in case between models and archive."""

        def __init__(self) -> None:
            pass

        def write(self, name: str, data: Any) -> None:
            raise NotImplementedError(name)

        def get(self, name: str) -> bytes:
            wanted = str(PurePosixPath(model).parent / name.strip().replace("\\", "/")).lower()
            if wanted not in files:
                raise FileNotFoundError(name)
            return box.read(files[wanted])

        def keys(self) -> Any:
            return files.keys()

        def namespaced(self, namespace: str) -> Any:
            raise NotImplementedError(namespace)

    stream = io.BytesIO(box.read(files.get(model.lower(), model)))
    scene = trimesh.load(
        stream, file_type="obj", resolver=Resolver(), process=False, group_material=True, split_objects=False
    )
    meshes = list(scene.geometry.values()) if hasattr(scene, "geometry") else [scene]
    meshes = [m for m in meshes if isinstance(m, trimesh.Trimesh) and len(m.faces)]
    if not meshes:
        return None
    vertices, faces, colours, uvs, textures, images, names = [], [], [], [], [], [], []
    base = 0
    for mesh in meshes:
        colour, image, uv, name = _material(mesh)
        count = len(mesh.faces)
        vertices.append(np.asarray(mesh.vertices, np.float32))
        faces.append(np.asarray(mesh.faces, np.int64) + base)
        colours.append(np.broadcast_to(colour, (count, 3, 3)))
        uvs.append(np.zeros((count, 3, 2), np.float32) if uv is None else uv[np.asarray(mesh.faces)])
        textures.append(np.full(count, len(images) if image is not None else -1, np.int64))
        if image is not None:
            images.append(image)
        names.append(name)
        base += len(mesh.vertices)
    surface = Surface(
        np.concatenate(vertices),
        np.concatenate(faces),
        np.concatenate(colours).astype(np.float32),
        np.concatenate(uvs).astype(np.float32),
        np.concatenate(textures),
        images,
    )
    return surface, tuple(dict.fromkeys(n for n in names if n))


def _material(mesh: Any) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None, str]:
    """Colour [3], texture or None, uv [V, 2] or None, and the names of material and texture file."""
    material = getattr(mesh.visual, "material", None)
    if material is None:
        return np.full(3, 0.7), None, None, ""
    colour = np.asarray(material.main_color[:3], np.float64) / 255
    kwargs = getattr(material, "kwargs", None) or {}
    opacity = float(np.atleast_1d(kwargs.get("d", 1.0))[0]) if kwargs.get("d") is not None else 1.0
    # Glass is drawn as a pale opaque surface: a picture of 64 px cannot show what lies behind it anyway.
    colour = colour * opacity + 0.92 * (1 - opacity)
    name = f"{getattr(material, 'name', '') or ''} {kwargs.get('map_kd', '')}".lower()
    image, uv = getattr(material, "image", None), getattr(mesh.visual, "uv", None)
    if image is None or uv is None or len(uv) != len(mesh.vertices) or opacity < 0.99:
        return colour, None, None, name
    small = image.convert("RGB")
    small.thumbnail((_TEXTURE, _TEXTURE), Image.Resampling.BOX)
    return colour, np.asarray(small, np.float32) / 255, np.asarray(uv, np.float32), name


def _placed(surface: Surface, entry: Mapping[str, str]) -> Surface:
    """Turned as the catalogue says, stretched to its real size, centred, and scaled into the unit ball."""
    points = surface.vertices.astype(np.float64)
    if "modelRotation" in entry:
        points = points @ np.array(entry["modelRotation"].split(), np.float64).reshape(3, 3).T
    used = points[np.unique(surface.faces)]
    low, high = used.min(0), used.max(0)
    extent = np.maximum(high - low, 1e-9)
    wanted = np.array([float(entry[k]) for k in ("width", "height", "depth")])
    points = (points - (low + high) / 2) * (wanted / extent)
    points /= np.linalg.norm(wanted) / 2
    return Surface(
        points.astype(np.float32), surface.faces, surface.colours, surface.uv, surface.texture, surface.textures
    )


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError:
        raise ConfigError(
            "Meshes need the package trimesh, which is not installed. Type: pip install efficient-diffusion-suite[3d]"
        ) from None
    return trimesh
