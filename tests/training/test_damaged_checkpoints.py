"""A checkpoint that is damaged or of another run is refused with its file's name, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from suite.errors import ConfigError
from suite.training.checkpoint import CHECKPOINT, TrainState, restore, store

OPTIONS = {"optimizer": "adamw", "seed": 0}
Damage = Callable[[Path], Any]


def begun() -> TrainState:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ema = {name: value.detach().clone() for name, value in network.named_parameters()}
    return TrainState(network, ema, [optimizer], step=5, seconds=1.5)


def facts(**changed: Any) -> Damage:
    def damage(path: Path) -> None:
        file = path / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return damage


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        found = load_file(path / part)
        change(found)
        save_file(found, path / part)

    return damage


def optimizers(change: Callable[[Any], Any]) -> Damage:
    def damage(path: Path) -> None:
        found = torch.load(path / "optimizers.pt", weights_only=True)
        torch.save(change(found), path / "optimizers.pt")

    return damage


def cut(part: str, share: float) -> Damage:
    def damage(path: Path) -> None:
        content = (path / part).read_bytes()
        (path / part).write_bytes(content[: int(len(content) * share)])

    return damage


def moment(value: Any) -> Damage:
    def change(found: Any) -> Any:
        found[0]["state"][0]["exp_avg"] = value
        return found

    return optimizers(change)


CASES: list[tuple[str, Damage]] = [
    *((part, cut(part, share)) for part in CHECKPOINT for share in (0, 0.5)),
    *((part, lambda path, part=part: (path / part).unlink()) for part in CHECKPOINT),
    *(("state.json", facts(step=value)) for value in (None, "x", -1, 1.5, 10**400, True)),
    *(("state.json", facts(seconds=value)) for value in (None, "x", -1, [], float("nan"))),
    *(("state.json", facts(options=value)) for value in (None, [], {}, {"optimizer": 1, "seed": 0})),
    ("checkpoint-", facts(options=OPTIONS | {"seed": 1})),
    ("checkpoint-", facts(options=OPTIONS | {"optimizer": "muon"})),
    ("state.json", lambda path: (path / "state.json").write_text("[]")),
    *(
        (part, tensors(part, change))
        for part in CHECKPOINT[1:3]
        for change in (
            lambda t: t.pop("bias"),
            lambda t: t.update(more=torch.zeros(1)),
            lambda t: t.update(bias=torch.zeros(3)),
            lambda t: t.update(bias=torch.zeros(2, dtype=torch.float64)),
            lambda t: t.update(bias=torch.tensor([0.0, torch.nan])),
        )
    ),
    *(("optimizers.pt", optimizers(lambda _, value=value: value)) for value in (None, 3, [], {}, [{}], [1], ["x"])),
    *(("optimizers.pt", moment(value)) for value in (torch.zeros(7), torch.full((2, 3), torch.inf))),
]


@pytest.mark.parametrize(("named", "damage"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_what_is_damaged_or_of_another_run_is_refused(tmp_path: Path, named: str, damage: Damage):
    path = store(tmp_path, begun(), OPTIONS)
    damage(path)
    with pytest.raises(ConfigError, match=named) as caught:
        restore(path, begun(), OPTIONS)
    assert len(str(caught.value)) < 2000


def test_a_whole_one_comes_back(tmp_path: Path):
    state, other = begun(), begun()
    restore(store(tmp_path, state, OPTIONS), other, OPTIONS)
    assert torch.equal(other.network.state_dict()["weight"], state.network.state_dict()["weight"])
    assert torch.equal(other.ema["bias"], state.ema["bias"])
    assert (other.step, other.seconds) == (5, 1.5)
