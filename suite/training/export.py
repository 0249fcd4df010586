"""Finished models: folders in diffusers' layout that appear part by part, each part whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files import temporary
from suite.files.output import writing

FACTS = "suite.json"


def export_folder(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    part: str,
    facts: Mapping[str, Any],
    out: Path,
    extra: Callable[[Path], None] | None = None,
    log: Path | None = None,
    **saving: Any,
) -> Path:
    """Write `out`: `part`/ with the weights in float16, suite.json with `facts`, loss.csv, and what `extra` adds.

    `network` is of the class to save, its weights are replaced; `extra(folder)` writes further files into the folder
    while it is made; `saving` goes to diffusers' `save_pretrained`. An existing folder keeps its other files. Raises
    ConfigError when weights do not fit float16.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.half()).all():
            raise ConfigError(f"{name} has values that float16 cannot hold: the run diverged, so there is no model")
    network.load_state_dict(weights)
    out.mkdir(parents=True, exist_ok=True)
    with writing(out), temporary.place(out) as partial:
        network.half().save_pretrained(partial / part, safe_serialization=True, **saving)  # pyright: ignore[reportCallIssue]
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        if extra:
            extra(partial)
        if log is not None and log.is_file():
            shutil.copy(log, partial / "loss.csv")
        temporary.flush(partial)
        # Without it a folder is no model, so it goes first and comes last: old facts never stand beside new weights.
        (out / FACTS).unlink(missing_ok=True)
        for item in sorted(partial.iterdir(), key=lambda item: item.name == FACTS):
            target = out / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)
        temporary.flush_name(out)
    return out


def write_pipeline(
    folder: Path, pipeline: str, absent: tuple[str, ...], part: str, network: str, **scheduling: Any
) -> None:
    """model_index.json and scheduler/ of an x0-predicting flow model, so that diffusers' `pipeline` opens the folder.

    The parts in `absent` are not in it: pass them as None, and prompts as `prompt_embeds`. `scheduling` are further
    settings of its scheduler.
    """
    import diffusers

    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index |= {name: [None, None] for name in absent}
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    index[part] = ["diffusers", network]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="sample",
        use_flow_sigmas=True,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        **scheduling,
    )
    scheduler.save_config(folder / "scheduler")
