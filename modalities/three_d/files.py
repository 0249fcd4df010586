"""GLB, OBJ and PLY files that carry the run's metadata where each format lets a program put it.

Vertex colours of OBJ and PLY are sRGB, as the programs that read them take them; those of GLB are linear (`glb`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError

if TYPE_CHECKING:
    from trimesh import Trimesh

KEY = "suite"
SUFFIXES = (".glb", ".obj", ".ply")
_COMMENT = {".obj": f"# {KEY} ", ".ply": f"comment {KEY} "}


def write(mesh: Trimesh, path: Path, metadata: Mapping[str, Any]) -> None:
    """One file, by its ending. Metadata: GLB asset.extras, a comment in the other two."""
    text = json.dumps(metadata)
    if path.suffix.lower() == ".glb":
        from suite.modalities.three_d.colours import vertex_colours
        from suite.modalities.three_d.glb import binary

        path.write_bytes(binary(mesh, vertex_colours(mesh), {KEY: metadata}))
    elif path.suffix.lower() == ".ply":
        from trimesh.exchange.ply import export_ply

        content = export_ply(mesh, vertex_normal=True)
        first, second, rest = content.split(b"\n", 2)
        path.write_bytes(b"\n".join([first, second, f"{_COMMENT['.ply']}{text}".encode("ascii"), rest]))
    else:
        from trimesh.exchange.obj import export_obj

        content = export_obj(mesh, include_normals=True, include_color=True, header="")
        path.write_text(f"{_COMMENT['.obj']}{text}\n{content}", encoding="utf-8")


def read_metadata(path: Path) -> Mapping[str, Any]:
    """What `write` put there. Raises ConfigError if the file is none of ours."""
    try:
        text = _glb_extras(path) if path.suffix.lower() == ".glb" else _comment(path)
        found = json.loads(text) if text else None
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise ConfigError(f"{path} is not a readable mesh: {error}") from error
    if found is None:
        raise ConfigError(f"{path} was not made by this suite: it has no metadata {KEY!r}")
    return found


def _glb_extras(path: Path) -> str | None:
    with open(path, "rb") as stream:
        magic, _, _ = struct.unpack("<4sII", stream.read(12))
        if magic != b"glTF":
            raise ValueError("no glTF header")
        length, _ = struct.unpack("<I4s", stream.read(8))
        tree = json.loads(stream.read(length))
    extras = tree["asset"].get("extras", {})
    return json.dumps(extras[KEY]) if KEY in extras else None


def _comment(path: Path) -> str | None:
    begin = _COMMENT[path.suffix.lower()].encode()
    with open(path, "rb") as stream:
        for _ in range(8):
            line = stream.readline()
            if line.startswith(begin):
                return line[len(begin) :].decode()
    return None
