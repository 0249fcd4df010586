"""The figure of docs/caches.md is what really runs, step by step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from suite.call import active_call
from suite.host.discovery import installed
from suite.plugin import Plugin
from suite.plugins.cache.deepcache import DeepCache
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.t_gate import TGate

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
from _tiny import Setup

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "caches.md").read_text(encoding="utf-8")
STEPS = 12
#: Title -> plugin, network, and the parts that are shown: label -> module.
ROWS: dict[str, tuple[Plugin, str, Mapping[str, str]]] = {
    "fora:interval=3": (
        FORA(3), "pixart", {"attention, MLP": "transformer_blocks.1.attn1", "norms, gates": "transformer_blocks.1"}
    ),
    "deepcache:interval=3": (
        DeepCache(3), "unet", {"inner layers": "mid_block", "last layer": "up_blocks.1.resnets.1"}
    ),
    "deepcache:interval=3,center=0.5,power=2": (
        DeepCache(3, center=0.5, power=2.0), "unet", {"inner layers": "mid_block"}
    ),
    "delta-dit:interval=2": (
        DeltaDiT(2), "pixart",
        {f"{where} blocks": f"transformer_blocks.{i}" for i, where in enumerate(("first", "middle", "last"))},
    ),
    "pab": (
        PAB(), "latte",
        {"attention": "transformer_blocks.0.attn1", "over frames": "temporal_transformer_blocks.0.attn1",
         "to the prompt": "transformer_blocks.0.attn2"},
    ),
    "t-gate:gate=0.5,interval=2": (
        TGate(0.5, 2), "pixart",
        {"uncond": "uncond", "to the prompt": "transformer_blocks.0.attn2",
         "self-attention": "transformer_blocks.0.attn1"},
    ),
}  # fmt: skip


def ran(plugin: Plugin, network: str, parts: Mapping[str, str]) -> dict[str, set[int]]:
    """Steps at which each part ran, recorded below the cache's patches."""
    setup, steps = Setup(network, steps=STEPS, guidance=3.0), {label: set() for label in parts}

    def record(label: str, forward):
        def below(*args, **kwargs):
            steps[label].add(active_call().step)
            return forward(*args, **kwargs)

        return below

    modules = {label: setup.module.get_submodule(name) for label, name in parts.items() if name != "uncond"}
    for label, module in modules.items():
        module.forward = record(label, module.forward)
    branches = set()
    hook = setup.module.register_forward_pre_hook(lambda *_: branches.add((active_call().step, active_call().branch)))
    try:
        setup.cached(plugin)
    finally:
        hook.remove()
        for module in modules.values():
            del module.__dict__["forward"]
    return {k: {s for s, b in branches if "uncond" in b} if n == "uncond" else steps[k] for k, n in parts.items()}


def figure() -> str:
    """`#` runs, `.` is reused or left out."""
    lines = []
    for title, row in ROWS.items():
        lines.append(title)
        for label, steps in ran(*row).items():
            lines.append(f"  {label:<16}" + "".join("#" if s in steps else "." for s in range(STEPS)))
    return "\n".join(lines)


def test_the_figure_is_what_runs() -> None:
    assert figure() in PAGE


@pytest.mark.parametrize("name", ["fora", "deepcache", "delta-dit", "pab", "t-gate"])
def test_every_method_has_a_section(name: str) -> None:
    assert f"\n## `{name}`" in PAGE and name in installed()


if __name__ == "__main__":
    print(figure())
