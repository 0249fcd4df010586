"""Model folders: diffusers' layout plus `suite.json`, which says what diffusers has no word for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from suite.errors import ConfigError
from suite.files import untrusted
from suite.files.inputs import check, read_json
from suite.files.untrusted import NAME, Anything, Flag, Items, Kind, Number, Section, Table, Text, Whole, shown
from suite.host.suggest import nearest
from suite.recipe import CONFIGS

DESCRIPTION = "suite.json"
#: The discrete families of `suite.diffusion.noise`, which cannot be asked here: it imports torch.
TOKEN_FAMILIES = ("masked", "uniform")


#: Facts that every modality may state; what a modality has of its own is in `Modality.facts`.
FACTS: Mapping[str, Kind] = {
    "name": Text(200),
    "modality": Text(100),
    "network": NAME,
    "noise": Section({"family": Text(100)}),
    "prediction": Text(100),
    "shape": Items(Whole(1, 65_536), 1, 8),
    "range": Items(Number(-1e6, 1e6), 2, 2),
    "text": Section({}, {"encoder": Text(100), "length": Whole(2, 512)}),
    "defaults": Table(Anything(), 100),
    "guidance_distilled": Flag(),
    "few_step": Flag(),
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model.

    Attributes:
        path: the folder.
        facts: content of `suite.json`: modality, network (sub-folder), noise, prediction, shape, ...
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name given in suite.json, or the folder's."""
        return str(self.facts.get("name") or self.path.name)

    @cached_property
    def hash(self) -> str:
        """sha256 over the weight files, in the order of their names."""
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*.safetensors")):
            check(file, "weights")
            with file.open("rb") as stream:  # a file may be larger than the memory
                while part := stream.read(2**20):
                    digest.update(part)
        return digest.hexdigest()

    @property
    def tokens(self) -> bool:
        """Whether the model is over tokens, not real vectors: known from the name of its noise family."""
        noise = self.facts.get("noise")
        return isinstance(noise, Mapping) and noise.get("family") in TOKEN_FAMILIES

    def fact(self, key: str) -> Any:
        """A required fact; ConfigError names the file when it is missing."""
        if self.facts.get(key) is None:
            raise ConfigError(f"{self.path / DESCRIPTION} says nothing about {key!r}")
        return self.facts[key]


def shipped(modality: str | None = None) -> dict[str, dict[str, Any]]:
    """Models that come with the suite: name -> {modality, path, summary}."""
    out = {}
    for file in sorted((CONFIGS / "models").glob("*.yaml")):
        entry = yaml.safe_load(file.read_text())
        if modality in (None, entry["modality"]):
            out[file.stem] = entry
    return out


def open_folder(
    name_or_path: str, modality: str, borrows: Sequence[str] = (), kinds: Mapping[str, Kind] | None = None
) -> ModelFolder:
    """A shipped model by name, or a folder, of `modality` or of one of those that it `borrows` from.

    Args:
        kinds: of the facts that the modality has of its own.

    Raises:
        ConfigError: neither exists, the folder is not a model, or it is of another modality.
    """
    known = shipped()
    if name_or_path in known:
        path = CONFIGS.parent / known[name_or_path]["path"]
    else:
        path = Path(name_or_path)
    if not os.path.isdir(path):
        hint = nearest(name_or_path, known) or f"; shipped: {', '.join(shipped(modality)) or 'none'}"
        raise ConfigError(f"no model {name_or_path!r}{hint}; or give a folder")
    description = path / DESCRIPTION
    if not os.path.exists(description):
        raise ConfigError(f"{path} is not a model folder: it has no {DESCRIPTION}")
    facts = read_json(description, "model description")
    folder = ModelFolder(path, untrusted.check(facts, Section({}, {**FACTS, **(kinds or {})}), str(description)))
    if folder.fact("modality") not in (modality, *borrows):
        raise ConfigError(f"model {name_or_path!r} is of the modality {shown(facts['modality'])}, not {modality!r}")
    return folder
