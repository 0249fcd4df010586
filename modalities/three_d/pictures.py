"""Pictures of a finished mesh: the preview sheet and the turntable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from suite.modalities.three_d.camera import Cameras, ring
from suite.modalities.three_d.colours import vertex_colours
from suite.modalities.three_d.field import Field
from suite.modalities.three_d.raster import rasterise

if TYPE_CHECKING:
    from trimesh import Trimesh

FRAMES = 36
RATE = 12
"""Frames a second."""
SIDE = 160
"""Pixels of a picture."""
SIDES = ring(8, math.radians(20))


def render(mesh: Trimesh, cameras: Cameras, size: int, oversample: int = 2) -> Tensor:
    """Views [V, 3, size, size] in [0, 1] on white, of vertex colours as they are: light is already in them."""
    vertices = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
    faces = torch.tensor(np.asarray(mesh.faces), dtype=torch.long)
    colours = torch.tensor(vertex_colours(mesh), dtype=torch.float32) / 255
    face, weights = rasterise(vertices, faces, cameras, size * oversample)
    page = torch.ones(*face.shape, 3)
    hit = face >= 0
    page[hit] = (colours[faces[face[hit]]] * weights[hit][..., None]).sum(1)
    return F.avg_pool2d(page.permute(0, 3, 1, 2), oversample)


def preview(mesh: Trimesh) -> Image.Image:
    """Eight sides of a mesh on one sheet."""
    return sheet(render(mesh, SIDES, SIDE))


@torch.no_grad()
def field_preview(field: Field) -> Image.Image:
    """Eight sides of a field on one sheet."""
    return sheet(field.render(SIDES, 64).pictures)


def sheet(pictures: Tensor, columns: int = 4) -> Image.Image:
    """Pictures [N, 3, S, S] in [0, 1] in reading order."""
    rows = [torch.cat(list(row), -1) for row in pictures.split(columns)]
    return as_picture(torch.cat(rows, -2))


def turntable(mesh: Trimesh) -> list[Image.Image]:
    """Frames of one turn, a little from above."""
    return [as_picture(p) for p in render(mesh, ring(FRAMES, math.radians(20)), SIDE)]


def as_picture(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> RGB."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def clip_suffix() -> str:
    """`.mp4` if PyAV is here, else `.gif`."""
    return ".mp4" if find_spec("av") else ".gif"


def write_clip(frames: Sequence[Image.Image], path: Path) -> None:
    """The turntable as H.264 or, by its ending, as GIF."""
    if path.suffix == ".gif":
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=1000 // RATE, loop=0)
        return
    import av

    with av.open(str(path), "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_image(frame)))
        box.mux(stream.encode())
