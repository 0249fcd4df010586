"""Text to 3D: a radiance field distilled from an image model that may be told the camera, then a mesh."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from suite.engine.score_distillation_options import OPTIONS, iterations
from suite.errors import ConfigError, EmptyError
from suite.files.untrusted import Kind, Text
from suite.modalities.three_d import files
from suite.modality import Modality
from suite.request import Request, RequestOption

if TYPE_CHECKING:  # the file endings and options are asked for before torch is loaded
    import torch
    from PIL.Image import Image as Picture
    from torch import Tensor, nn
    from trimesh import Trimesh

    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng
    from suite.engine.score_distillation import Distilled
    from suite.host.models import ModelFolder
    from suite.modalities.three_d.scene import FieldScene


@dataclass(frozen=True)
class Solid:
    """A finished object.

    Attributes:
        mesh: closed, vertex colours, normals outward, y up, front towards +z; None if the field stayed empty.
        preview: eight sides of the mesh, or of the field if there is no mesh.
        frames: of the turntable; none without a mesh.
        log: a record an iteration.
    """

    mesh: Trimesh | None
    preview: Picture
    frames: Sequence[Picture] = field(repr=False)
    log: Sequence[Mapping[str, float]] = field(repr=False)


class ThreeD(Modality):
    """One opened prior. x is [V, 3, S, S] in [-1, 1], views of the object; artifacts are `Solid`s."""

    name: ClassVar[str] = "3d"
    suffixes: ClassVar[tuple[str, ...]] = files.SUFFIXES
    beside: ClassVar[tuple[str, ...]] = (".preview.png", ".log.csv", ".turntable.mp4", ".turntable.gif")
    driver: ClassVar[str] = "distill"
    borrows: ClassVar[tuple[str, ...]] = ("image",)
    facts: ClassVar[Mapping[str, Kind]] = MappingProxyType({"camera": Text(100)})
    #: Distillation looks for one object that all views agree on, and needs more guidance than sampling does.
    borrowed: ClassVar[Mapping[str, Any]] = MappingProxyType({"guidance": 10.0})
    options: ClassVar[tuple[RequestOption, ...]] = (
        *OPTIONS,
        RequestOption("resolution", int, "Cells a side from which the mesh is made.", default=80, low=24, high=256),
        RequestOption(
            "refine", int, "Steps that fit its colours to views of the field.", default=60, low=0, high=10_000
        ),
        RequestOption(
            "refine-shape",
            int,
            "Steps that move its vertices to the field's silhouettes first; needs pytorch3d.",
            default=0,
            low=0,
            high=10_000,
        ),
    )
    calibration_prompts: ClassVar[tuple[str, ...]] = ("a chair", "a round table", "a red sofa", "a street lamp")
    headline: ClassVar[Mapping[str, int]] = MappingProxyType({"alignment": 1, "consistency": 1})

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        from suite.modalities.image import Image

        self._image = Image(folder, device, dtype)
        self.folder, self.device = folder, device
        self.network, self.noise, self.prediction = self._image.network, self._image.noise, self._image.prediction
        self.told = folder.facts.get("camera") == "token"

    @classmethod
    def work(cls, steps: int, options: Mapping[str, Any], batch: int) -> int:
        return iterations(steps, options) * batch

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """Standard normal times sigma(1): what the prior itself starts from, when its inputs are recorded."""
        return self._image.prior(request, rng)

    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Token states of the prompts and their mask, seen from the front if the prior is told the camera."""
        import torch

        from suite.modalities.three_d.camera import Cameras
        from suite.modalities.three_d.scene import seen_from

        count = request.batch
        front = Cameras(torch.zeros(count, device=self.device), torch.full((count,), 0.25, device=self.device))
        return {name: seen_from(rows, front, self.told) for name, rows in self._image.encode(request).items()}

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """As the image modality calls it: the camera is one more token."""
        return self._image.forward(module, x, time, cond)

    def representation(self, request: Request, index: int, seed: int) -> FieldScene:
        """A field that starts as a blob, and the prompt that it is to become."""
        from suite.diffusion.rng import generator
        from suite.modalities.three_d.field import Field
        from suite.modalities.three_d.raster import require
        from suite.modalities.three_d.scene import FieldScene

        if request.options["refine-shape"]:
            require("--refine-shape")
        field = Field(generator=generator(seed, "field")).to(self.device)
        one = Request((request.prompts[index],), request.negative, request.options)
        size, count = self._image.shape[-1], int(request.options["views"] or 1)
        return FieldScene(field, self._image.encode(one), size, count, self.told)

    def decode(self, x0: Sequence[Distilled], request: Request) -> list[Solid]:
        """Meshes of the fields, with their pictures."""
        import torch

        from suite.diffusion.rng import repeatable
        from suite.modalities.three_d.mesh import extract
        from suite.modalities.three_d.pictures import field_preview, preview, turntable
        from suite.modalities.three_d.refine import refine
        from suite.modalities.three_d.refine_shape import refine_shape
        from suite.modalities.three_d.scene import FieldScene

        solids = []
        for distilled in x0:
            scene = distilled.representation
            assert isinstance(scene, FieldScene)
            field = scene.field
            mesh = extract(field, int(request.options["resolution"] or 0))
            with repeatable(torch.device("cpu")):  # where meshes are
                if mesh is not None and (steps := int(request.options["refine-shape"] or 0)):
                    refine_shape(mesh, field, steps)
                if mesh is not None and (steps := int(request.options["refine"] or 0)):
                    refine(mesh, field, steps)
            sheet = field_preview(field) if mesh is None else preview(mesh)
            solids.append(Solid(mesh, sheet, [] if mesh is None else turntable(mesh), distilled.log))
        return solids

    def why_empty(self, artifact: Solid) -> str:
        """No surface, or one without faces."""
        if artifact.mesh is not None and len(artifact.mesh.faces):
            return ""
        return (
            "the field stayed empty: it has no surface to make a mesh of. Try another --seed, more --iterations, "
            "or a plainer prompt"
        )

    def save(self, artifact: Solid, path: Path, metadata: Mapping[str, Any]) -> None:
        """GLB, OBJ or PLY. EmptyError if there is no surface."""
        if artifact.mesh is None:
            raise EmptyError(self.why_empty(artifact))
        files.write(artifact.mesh, path, metadata)

    def extras(self, artifact: Solid, metadata: Mapping[str, Any]) -> Mapping[str, Callable[[Path], None]]:
        """The preview, the turntable and the log of the run."""
        from suite.modalities.three_d.pictures import clip_suffix, write_clip

        del metadata
        found: dict[str, Callable[[Path], None]] = {
            ".preview.png": partial(artifact.preview.save, format="PNG"),
            ".log.csv": partial(_write_log, artifact.log),
        }
        if artifact.frames:
            found[f".turntable{clip_suffix()}"] = partial(write_clip, artifact.frames)
        return found

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata of a mesh that `save` wrote."""
        return files.read_metadata(path)

    @classmethod
    def read_whole(cls, path: Path) -> Sequence[Mapping[str, Any]]:
        """The metadata of a mesh that can be loaded."""
        import trimesh

        found = cls.read_metadata(path)
        try:
            trimesh.load(path)
        except Exception as error:  # each format has errors of its own
            raise ConfigError(f"{path} is not a whole mesh: {error}") from error
        return [found]

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        from suite.modalities.shared.words import check_words

        check_words(request.prompts)

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> list[str]:
        from suite.modalities.shared.words import prompt_warnings

        return prompt_warnings(folder, request)

    def metrics(self, artifacts: Sequence[Solid], prompts: Sequence[str]) -> dict[str, float]:
        """Alignment and R-precision of views, consistency between views, closedness."""
        from suite.modalities.three_d.metrics import evaluate

        return evaluate([artifact.mesh for artifact in artifacts], prompts)


def _write_log(log: Sequence[Mapping[str, float]], path: Path) -> None:
    with open(path, "w", newline="") as stream:
        names = list(dict.fromkeys(name for record in log for name in record))
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in record.items()} for record in log)
