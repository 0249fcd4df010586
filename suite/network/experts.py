"""Experts: other networks that answer for part of the times of a run.

A small network suffices where there is little signal (T-Stitch), and networks that know one range of noise each cost
no more than one that knows all (eDiff-I). Whoever answers, x0 is x0: solvers, guidance and caches see one denoiser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.files.inputs import read_bytes
from suite.host.discovery import MODALITIES, find, installed
from suite.host.models import open_folder

if TYPE_CHECKING:  # plugins' modules import this one, and must load without torch
    from torch import Tensor

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Counter, Denoiser, Forward, NetworkDenoiser
    from suite.host.models import ModelFolder
    from suite.modality import Modality
    from suite.network import Network


SAME = "same"
"""What names the model in use as its own companion: a check that handing over changes nothing."""


@dataclass(frozen=True)
class Companion:
    """Another opened model that could stand in for the one in use.

    Attributes:
        name: of its folder.
        hash: of its weights.
        network: with its facts.
        forward: how it is called.
    """

    name: str
    hash: str
    network: Network
    forward: Forward


@dataclass(frozen=True)
class Companions:
    """How the `compress` hook opens another model: a shipped name or a folder, each loaded once.

    Attributes:
        open: ConfigError if there is no such model, or if it does not fit the one in use; see `companion_folder`.
    """

    open: Callable[[str], Companion]


@dataclass(frozen=True)
class Expert:
    """A companion and when it answers instead of the model in use; a part of a `Wrap`.

    Attributes:
        companion: the network.
        takes: whether it answers a call. It sees the engine's record only, never x.
        tally: calls (depth) and branches (nfe) that it has answered.
    """

    companion: Companion
    takes: Callable[[Call], bool]
    tally: Counter = field(compare=False)


@dataclass(frozen=True)
class SwitchedDenoiser:
    """The network in use, or the first expert that takes the call; one of them an evaluation."""

    main: NetworkDenoiser
    others: tuple[tuple[Expert, NetworkDenoiser], ...]

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        for expert, denoiser in self.others:
            if expert.takes(call):
                expert.tally.add(len(call.branches))
                return denoiser.denoise(x, t, cond, call)
        return self.main.denoise(x, t, cond, call)


def switched(main: NetworkDenoiser, experts: Sequence[Expert]) -> Denoiser:
    """The denoiser that asks experts where they take over; all are counted by the counter of `main`."""
    if not experts:
        return main
    others = [(e, replace(main, module=e.companion.network.module, forward=e.companion.forward)) for e in experts]
    return SwitchedDenoiser(main, tuple(others))


def companion_folder(folder: ModelFolder, name: str) -> ModelFolder:
    """The folder of a model that can take over in the middle of a run of the one in `folder`. No torch here.

    Args:
        folder: of the model in use.
        name: a shipped name or a folder, or `SAME`, which is the model in use itself.

    Raises:
        ConfigError: there is no such model, or x, its noise, its conditioning, its vocabulary or what is predicted
            differ.
    """
    if name == SAME:
        return folder
    modality = str(folder.fact("modality"))
    cls: type[Modality] = find(modality, installed(MODALITIES), "modality").load()
    other = open_folder(name, modality, kinds=cls.facts)
    for fact in cls.interface:
        mine, theirs = folder.facts.get(fact), other.facts.get(fact)
        if mine != theirs:
            raise ConfigError(
                f"model {other.name} cannot take over from {folder.name}: its {fact} is {_text(theirs)}, not "
                f"{_text(mine)}; networks that share a run must share it"
            )
    if cls.vocabulary and _digest(folder.path / cls.vocabulary) != _digest(other.path / cls.vocabulary):
        raise ConfigError(
            f"model {other.name} cannot take over from {folder.name}: its {cls.vocabulary} differs, so their tokens "
            "mean different words"
        )
    return other


def _text(value: Any) -> str:
    return "not given" if value is None else str(value)


def _digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file, "vocabulary")).hexdigest()
