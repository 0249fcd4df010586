"""Text to image: pixels or latents, a diffusers transformer or U-Net, MiniLM conditioning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image as Pictures
from PIL import ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo

from suite.errors import ConfigError
from suite.files.untrusted import parse_json
from suite.modality import Modality

if TYPE_CHECKING:  # the file endings are checked before torch is loaded
    import torch
    from torch import Tensor, nn

    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng
    from suite.host.models import ModelFolder
    from suite.request import Request

KEY = "suite"
PATCHED = "transformer"


class Image(Modality):
    """One opened image model. x is [B, 3, H, W] in [-1, 1]; artifacts are RGB pictures."""

    name: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    reads: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
    headline: ClassVar[Mapping[str, int]] = MappingProxyType({"frechet": -1, "alignment": 1})

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        from suite.diffusion import noise
        from suite.diffusion.prediction import Prediction
        from suite.modalities.shared.words import text_length
        from suite.network import Layout, Network
        from suite.network.weights import load_network

        self.folder = folder
        self.device = device
        self.dtype = dtype
        kind = str(folder.fact("network"))
        shape = folder.fact("shape")
        if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise ConfigError(f"model {folder.name}: shape {shape!r} in suite.json; expected [channels, height, width]")
        self.shape: tuple[int, ...] = tuple(shape)
        self.noise = noise.from_config(folder.fact("noise"))
        self.prediction = Prediction.named(folder.fact("prediction"))
        module = load_network(folder.path / kind, device, dtype)
        patch = int(getattr(module.config, "patch_size", 1) or 1) if kind == PATCHED else 1
        layout = Layout(self.shape, tokens=(self.shape[1] // patch) * (self.shape[2] // patch))
        self.network = Network(module, layout, bool(folder.facts.get("guidance_distilled")))
        self._length = text_length(folder)

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """Standard normal times sigma(1), [B, 3, H, W]."""
        return rng.normal(self.shape) * float(self.noise.sigma(1.0))

    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Token states [B, L, 384] and their mask [B, L]; the unconditional branch is the negative prompt's."""
        from suite.modalities.shared.text_encoder import branches

        return branches(request.prompts, request.negative, self._length, self.device, self.dtype)

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Call a PixArt transformer or a conditional U-Net; both take token states and a mask."""
        if self.folder.fact("network") == PATCHED:
            from suite.modalities.shared.pixart import call_pixart

            return call_pixart(module, x, time, cond)
        return module(x, time, cond["states"], encoder_attention_mask=cond["mask"], return_dict=False)[0]

    def decode(self, x0: Tensor, request: Request) -> list[Pictures.Image]:
        """RGB pictures, one a row."""
        import torch

        levels = ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Pictures.fromarray(row.numpy()) for row in levels.cpu()]

    def save(self, artifact: Pictures.Image, path: Path, metadata: Mapping[str, Any]) -> None:
        """A PNG whose text chunk `suite` holds the metadata as JSON."""
        info = PngInfo()
        info.add_itxt(KEY, json.dumps(metadata))
        artifact.save(path, format="PNG", pnginfo=info)

    @classmethod
    def read(cls, path: Path) -> Pictures.Image:
        """A picture as RGB, as a viewer shows it; see `shared.pictures`. What shows through it is white, and of several
        frames the first counts."""
        from suite.modalities.shared.pictures import as_seen, on_white, opened

        with opened(path) as picture:
            return on_white(as_seen(picture))

    def to_x0(self, content: Pictures.Image, request: Request) -> Tensor:
        """[1, 3, H, W] in [-1, 1]: the middle of the picture, as large as its shape allows, in the model's size."""
        if self.shape[0] != 3:
            raise ConfigError(f"model {self.folder.name} has {self.shape[0]} channels; only RGB models take pictures")
        size = (self.shape[2], self.shape[1])
        if content.size != size:
            content = ImageOps.fit(content, size, Pictures.Resampling.LANCZOS)
        return as_tensor([content]).float() / 127.5 - 1

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata of a PNG that `save` wrote."""
        from suite.modalities.shared.pictures import opened

        with opened(path) as picture:
            picture.load()
            text = picture.text.get(KEY) if isinstance(picture, PngImageFile) else None
        if text is None:
            raise ConfigError(f"{path} was not made by this suite: it has no PNG text chunk {KEY!r}")
        return parse_json(text, f"{path}: its metadata")

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        from suite.modalities.shared.words import check_words

        check_words(request.prompts)

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> list[str]:
        from suite.modalities.shared.words import prompt_warnings

        return prompt_warnings(folder, request)

    def metrics(self, artifacts: Sequence[Pictures.Image], prompts: Sequence[str]) -> dict[str, float]:
        """Frechet and kernel distance to the Fluent pictures, and alignment with the prompts."""
        from suite.modalities.image.metrics import evaluate

        return evaluate(as_tensor(artifacts), prompts)


def as_tensor(pictures: Sequence[Pictures.Image]) -> Tensor:
    """uint8 [N, 3, H, W] of equally large pictures."""
    import torch

    rows = [torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8) for p in pictures]
    return torch.stack([r.reshape(p.height, p.width, 3) for r, p in zip(rows, pictures, strict=True)]).permute(
        0, 3, 1, 2
    )
