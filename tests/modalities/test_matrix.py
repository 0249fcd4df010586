"""Every first-party plugin in every modality that ships a model, for real: it runs, or the user is told why not.

What does not work must follow from what is declared: the plugin's modalities, whether its solver steps tokens, and
the words that the rules read. What only the shape of a network decides is listed here, with its reason. Any other
refusal is a defect. `make test` runs each plugin with one of the models in turn, `make test-all` with every one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from suite import Engine
from suite.errors import ConfigError, NoOpError, PluginError, RuleError
from suite.host.discovery import MODALITIES, installed
from suite.host.manager import implemented_hooks
from suite.host.models import shipped
from suite.host.plan import Plan, make_plan
from suite.recipe import Named, Recipe
from suite.testing.oracles import a_run

sys.path.insert(0, str(Path(__file__).parent))
from _short import OPTIONS, prompt

OWN = "efficient-diffusion-suite"
STEPS = 9  # from eight steps on, neighbouring ones are alike enough for the rules

MODELS = [
    (modality, model)
    for modality, entry in installed(MODALITIES).items()
    if entry.distribution == OWN
    for model in shipped(modality) or [next(iter(shipped(entry.load().borrows[0])))]
]
PLUGINS = [
    (hook, name)
    for name, entry in sorted(installed().items())
    if entry.distribution == OWN
    for hook in sorted(implemented_hooks(entry.load()))
]
#: Plugin and model -> what the plugin says of this network.
SHAPES = {
    ("first-block", "emoji-unet-32"): "nested in the stages of a U-Net",
    ("cache-dit", "emoji-unet-32"): "nested in the stages of a U-Net",
    **{("cache-dit", name): "never the network's forward" for name in ("gloss-masked", "gloss-continuous")},
    ("delta-dit", "emoji-unet-32"): "nested in the stages of a U-Net",
    **{("deepcache", name): "looked for a U-Net" for _, name in MODELS if name != "emoji-unet-32"},
    **{("diffusers-cache", name): "diffusers' hook does not fit" for name in ("gloss-masked", "gloss-continuous")},
    **{("t-gate", name): "looked for cross_attention" for name in ("gloss-masked", "gloss-continuous")},
    ("early-exit", "emoji-unet-32"): "nested in the stages of a U-Net",
    ("text-kv", "gloss-continuous"): "where text and sample share one sequence",
    ("text-kv", "gloss-masked"): "where text and sample share one sequence",
    ("nirvana", "gloss-continuous"): "and no vectors",
    ("nirvana", "gloss-masked"): "and no vectors",
    # Its prior is told the camera among the words, and the camera is another one at every iteration.
    ("text-kv", "furniture-64"): "the text was another one at every evaluation",
}
#: What a plugin needs of the rest of the recipe to act on a model over tokens.
BESIDE = {
    "prefix-kv": Recipe(solver=Named("confidence", {"block": 4})),
    "dual-kv": Recipe(solver=Named("confidence", {"block": 4})),
    "unchanged": Recipe(steps=40),  # more than tokens, so that some step changes none
}


def cells() -> list:
    """One parameter a cell; the cells of the quick suite go along a diagonal."""
    out = []
    for (row, (hook, name)), (column, (modality, model)) in product(enumerate(PLUGINS), enumerate(MODELS)):
        quick = row % len(MODELS) == column
        marks = [] if quick else [pytest.mark.slow]
        out.append(pytest.param(hook, name, modality, model, id=f"{name}-{modality}-{model}", marks=marks))
    return out


def planned(hook: str, name: str, modality: str, model: str) -> Plan:
    """The model's own defaults with this one plugin in its hook, set so that it acts."""
    named = Named(name, dict(installed()[name].load().acting_options))
    chosen = {hook: named if hook in ("schedule", "solver") else (named,)}
    recipe = BESIDE.get(name, Recipe()).over(Recipe(**chosen, steps=STEPS, guidance=2.0, dtype="fp32"))
    return make_plan(modality, overrides=recipe, model=model)


def declared(engine: Engine, hook: str, name: str) -> str | None:
    """Why, by what is declared, this plugin does not work with this model; None if it should."""
    tokens = engine.modality.noise.discrete
    plugin = engine.plan.manager.of(hook)[0].plugin
    if hook == "parallelize":
        return "one process"
    if hook == "schedule":
        try:
            engine.plan.manager.schedule(engine.modality.noise, a_run(steps=STEPS))
        except ConfigError:
            return "needs real-valued noise" if tokens else None
    if hook == "solver":
        try:
            solver = plugin.solver(engine.modality.noise, a_run(steps=STEPS))
        except ConfigError:
            return None if tokens else "tokens"
        if engine.modality.driver == "distill" and solver.facts.min_steps > 1:
            return "needs at least"  # a teacher's target is one step
        if solver.facts.discrete != tokens:
            return "steps tokens" if solver.facts.discrete else "steps real vectors"
    return SHAPES.get((name, engine.plan.folder.name))


@pytest.mark.parametrize(("hook", "name", "modality", "model"), cells())
def test_runs_or_says_why_not(hook: str, name: str, modality: str, model: str) -> None:
    if package := {"cache-dit": "cache_dit"}.get(name):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `caches`)")
    cls = installed()[name].load()
    if cls.modalities is not None and modality not in cls.modalities:
        with pytest.raises(PluginError, match=modality):
            planned(hook, name, modality, model)
        return
    try:
        plan = planned(hook, name, modality, model)
    except ConfigError as error:  # a rule, or a grid that was fitted to something else
        said = r"\(rule \w+; " if isinstance(error, RuleError) else "was fitted to another model"
        assert name in str(error) and re.search(said, str(error))
        return
    with Engine(plan) as engine:
        why = declared(engine, hook, name)
        if why:
            with pytest.raises((ConfigError, NoOpError), match=why):
                engine.generate(prompt(modality), options=OPTIONS.get(modality))
            return
        result = engine.generate(prompt(modality), options=OPTIONS.get(modality))
    (row,) = [p for p in result.report.to_dict()["plugins"] if p["name"].partition(":")[0] == name]
    assert row["hook"] == hook and (hook in ("schedule", "solver") or row["did"] > 0)
    assert len(result.artifacts) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "model"), MODELS, ids=lambda value: value)
def test_two_ranks_share_the_branches(modality: str, model: str, tmp_path: Path) -> None:
    options = [text for key, value in OPTIONS.get(modality, {}).items() for text in (f"--{key}", str(value))]
    suffix = installed(MODALITIES)[modality].load().suffixes[0]
    suite = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "suite.cli"]
    chosen = [modality, prompt(modality), "--model", model, "--parallelize", "cfg", "--guidance", "2", "--steps", "3"]
    command = [*suite, *chosen, *options, "--dtype", "fp32", "--json", "-o", f"out{suffix}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["reports"]
    (row,) = [p for p in report["plugins"] if p["hook"] == "parallelize"]
    assert row["did"] > 0 and report["world"] == 2
