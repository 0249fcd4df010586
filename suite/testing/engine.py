"""An `Engine` over the kit's tiny networks: whole runs, with whatever plugins, in a tenth of a second."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suite.diffusion.denoiser import Cond
from suite.diffusion.rng import SampleRng
from suite.engine.engine import Engine
from suite.errors import ConfigError
from suite.host.discovery import Entry, installed
from suite.host.manager import Manager, load
from suite.host.models import ModelFolder
from suite.host.plan import Plan
from suite.modality import Modality
from suite.recipe import Recipe
from suite.request import Request
from suite.testing.tiny import MASK, Tiny, TinyTokens, forward, forward_tokens

NETWORK = "transformer"
STEPS = 11
"""Those of the kit's calibrations."""


class TinyModality(Modality):
    """One tiny network of untrained weights; artifacts are rows of x0, files are their bytes."""

    name: ClassVar[str] = "tiny"
    suffixes: ClassVar[tuple[str, ...]] = (".bin",)
    calibration_prompts: ClassVar[tuple[str, ...]] = ("one", "two")

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        kind = folder.fact("network")
        self.folder = folder
        self.tiny = (TinyTokens if kind == "tokens" else Tiny).build(0, kind)
        nn.Module.to(self.tiny.module, device=device, dtype=dtype)  # diffusers' override logs advice
        self.network, self.noise, self.prediction = self.tiny.network, self.tiny.noise, self.tiny.prediction
        self.mask_token = MASK if kind == "tokens" else None

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        return self.tiny.prior(rng.seeds)

    def encode(self, request: Request) -> Mapping[str, Cond]:
        return self.tiny.cond([zlib.crc32(prompt.encode()) % 1000 for prompt in request.prompts])

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return (forward if self.mask_token is None else forward_tokens)(module, x, time, cond)

    def decode(self, x0: Tensor, request: Request) -> list[Tensor]:
        return [row.clone() for row in x0]

    def save(self, artifact: Tensor, path: Path, metadata: Mapping[str, Any]) -> None:
        path.write_bytes(artifact.numpy().tobytes())

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        raise ConfigError(f"{path} is a tensor that the kit wrote: it carries no metadata")


def tiny_engine(network: str = NETWORK, *, extra: Mapping[str, Entry] | None = None, **recipe: Any) -> Engine:
    """An engine of one of the kit's networks.

    Args:
        network: a key of `suite.testing.tiny.NETWORKS`.
        extra: plugins besides those that are installed.
        recipe: fields of a recipe over eleven even steps of Euler, fp32, guidance 3.
    """
    return Engine(tiny_plan(network, extra=extra, **recipe), "cpu")


def tiny_plan(network: str = NETWORK, *, extra: Mapping[str, Entry] | None = None, **recipe: Any) -> Plan:
    """Its plan. What the rules, and the plugins' own checks of a model folder, would refuse is let through."""
    tokens = network == "tokens"
    content = {
        "steps": STEPS,
        "dtype": "fp32",
        "guidance": 3.0,
        "guidance_interval": (0.0, 1.0),
        "schedule": "uniform",
        "solver": "confidence" if tokens else "euler",
    }
    complete = Recipe.from_dict(content | recipe)
    facts = {"modality": "tiny", "name": "tiny", "network": network}
    entry = Entry("tiny", f"{__name__}:TinyModality", "suite.testing", "0")
    active = load(complete, {**installed(), **(extra or {})}, "text" if tokens else "image")
    return Plan(entry, ModelFolder(Path("tiny"), facts), complete, Manager(active), (), allow_noop=True)


def rows_of(artifacts: Sequence[Tensor]) -> Tensor:
    """All artifacts as one tensor."""
    return torch.stack(list(artifacts))
