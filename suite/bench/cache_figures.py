"""The figures of the documentation's cache pages, each from a run of a shipped model.

python -m suite.bench.cache_figures docs/images/caches [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.bench.blocks import draw
from suite.cli import main as command
from suite.cli.cache_show import chosen, instead, title
from suite.engine.engine import Engine
from suite.errors import ConfigError
from suite.host.plan import make_plan

TEMPORARY = "{temporary}"
PARTS, BLOCKS = "transformer_blocks.[035]*", "transformer_blocks.?"


@dataclass(frozen=True)
class Shown:
    """What a figure shows.

    Attributes:
        cache: with its options; `TEMPORARY` is a folder that lasts for all figures.
        part: names of the parts that are drawn.
        kind: their kinds.
        recipe: of the run, over the model's defaults.
        calibrate: command that makes a file first.
        runs: how many; the last one is drawn.
    """

    cache: str
    part: str = PARTS
    kind: str = ""
    modality: str = "image"
    model: str = "emoji-64"
    prompt: str = "a red heart"
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"steps": 20})
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrate: tuple[str, ...] = ()
    runs: int = 1


EVEN = {"steps": 50, "solver": "ddim", "schedule": "uniform", "guidance_interval": [0, 1]}
BETA = {"steps": 20, "solver": "dpmpp-2m", "schedule": "beta"}
QUICK = ("--steps", "20", "--samples", "1", "--check", "1", "--batch", "1", "--dtype", "fp32")
TEXT: dict[str, Any] = {
    "modality": "text",
    "model": "gloss-masked",
    "prompt": "dog (noun)",
    "part": "model.layers.[05].*",
}
FIGURES: dict[str, Shown] = {
    "fora": Shown("fora:interval=3"),
    "deepcache": Shown("deepcache:interval=3", model="emoji-unet-32", part="*", kind="down/mid/up"),
    "delta-dit": Shown("delta-dit:interval=2", BLOCKS),
    "pab": Shown(
        "pab", "*blocks.[05].*", "attention/cross_attention/temporal_attention", "video", "motion-64", "a red ball"
    ),
    "t-gate": Shown("t-gate:gate=0.5,interval=2", PARTS),
    "diffusers-cache": Shown("diffusers-cache:name=taylorseer,interval=3"),
    "cache-dit": Shown("cache-dit:threshold=0.12", BLOCKS, recipe=EVEN),
    "first-block": Shown("first-block:threshold=0.1", BLOCKS, recipe=EVEN),
    "teacache": Shown("teacache:threshold=0.1", BLOCKS, recipe=EVEN),
    "magcache": Shown("magcache", BLOCKS, recipe=EVEN),
    "block-cache": Shown(
        f"block-cache:file={TEMPORARY}/block-cache.json,adjust=false,threshold=0.5",
        recipe=BETA,
        calibrate=("block-cache:adjust=false", *QUICK, "-o", f"{TEMPORARY}/block-cache.json"),
    ),
    "learned": Shown("learned", recipe=BETA),
    "early-exit": Shown("early-exit:depth=0.5/0.75/1", BLOCKS),
    "taylorseer": Shown("taylorseer:interval=3"),
    "forecast": Shown("forecast:interval=2", BLOCKS),
    "text-kv": Shown("text-kv", "transformer_blocks.[05].attn2.to_*", "layer"),
    "unchanged": Shown("unchanged", **TEXT, recipe={"solver": "mdlm", "steps": 48}, options={"length": 16}),
    "prefix-kv": Shown(
        "prefix-kv:block=8", **TEXT, recipe={"solver": "threshold:block=8,threshold=1", "steps": 32},
        options={"length": 32},
    ),
    "dual-kv": Shown(
        "dual-kv:block=8", **TEXT, recipe={"solver": "threshold:block=8,threshold=1", "steps": 32},
        options={"length": 32},
    ),
    "nirvana": Shown(f"nirvana:store={TEMPORARY}/nirvana", BLOCKS, recipe={"steps": 20, "solver": "ddim"}, runs=2),
    "redi": Shown(f"redi:store={TEMPORARY}/redi", BLOCKS, recipe={"steps": 20, "solver": "ddim"}, runs=2),
}  # fmt: skip


def report_of(shown: Shown, temporary: str, engines: dict[str, Engine]) -> dict[str, Any]:
    """The report of the run that is drawn."""
    if shown.calibrate:
        words = [word.replace(TEMPORARY, temporary) for word in shown.calibrate]
        if command(["cache", "calibrate", *words]):
            raise ConfigError(f"the calibration {' '.join(words)} failed")
    content = {"dtype": "fp32", **shown.recipe, "cache": [shown.cache.replace(TEMPORARY, temporary)]}
    plan = make_plan(shown.modality, content, model=shown.model)
    if shown.model not in engines:
        engines[shown.model] = Engine(plan, "cpu")
    engine = engines[shown.model].under(plan)
    reports = [
        engine.generate(shown.prompt, options=shown.options, watch_blocks=True).report for _ in range(shown.runs)
    ]
    return reports[-1].to_dict()


def main(folder: Path, names: list[str]) -> None:
    """Draw the figures of these caches, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names or FIGURES:
            shown = FIGURES[name]
            report = report_of(shown, temporary, engines)
            parts = chosen(report["blocks"]["parts"], shown.kind, shown.part)
            heading = title(report).replace(f"store={temporary}/", "store=").replace(f"file={temporary}/", "file=")
            draw(folder / f"{name}.png", heading, instead(report), report["blocks"]["asked"], parts)
            print(folder / f"{name}.png", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
