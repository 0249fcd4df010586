"""One engine, one recipe, one report: what every modality that ships a model has in common."""

import math
from dataclasses import fields

import pytest

from suite import Engine
from suite.errors import ConfigError
from suite.host.discovery import MODALITIES, installed
from suite.host.plan import make_plan
from suite.observe.report import RunReport
from suite.recipe import Recipe

DISTRIBUTION = "efficient-diffusion-suite"
PROMPTS = {"text": "disaster (noun)", "audio": "a piano", "video": "a butterfly", "3d": "a red apple"}
#: Options that keep a run short; what they are called is the modality's own affair.
SHORT = {"3d": {"iterations": 3, "resolution": 24, "refine": 0}}


def ready() -> list[str]:
    """First-party modalities with a model to run by default, their own or a borrowed one."""
    names = []
    for name, entry in installed(MODALITIES).items():
        if entry.distribution == DISTRIBUTION:
            try:
                make_plan(name, "fast")
            except ConfigError:
                continue
            names.append(name)
    return names


READY = ready()


def test_images_and_objects_are_among_them() -> None:
    assert {"image", "3d"} <= set(READY)


@pytest.mark.parametrize("name", READY)
def test_one_recipe_runs_everywhere_and_reports_alike(name: str) -> None:
    options = {o.name for o in installed(MODALITIES)[name].load().options}
    short = {k: v for k, v in SHORT.get(name, {}).items() if k in options}
    with Engine.from_recipe("fast", modality=name) as engine:
        result = engine.generate(PROMPTS.get(name, "a red apple"), options=short)
    report = result.report.to_dict()
    assert set(report) == {f.name for f in fields(RunReport)}
    assert (report["modality"], report["recipe"]["name"], len(result.artifacts)) == (name, "fast", 1)
    assert report["nfe"] > 0 and report["depth"] > 0 and report["network_bytes"] > 0
    assert set(report["seconds"]) == {"load", "encode", "sample", "decode"}
    assert {p["hook"] for p in report["plugins"]} == {"schedule", "solver"}
    assert {o.name for o in engine.modality.options} == set(report["options"])


@pytest.mark.parametrize("recipe", ["reference", "quality", "balanced", "fast"])
@pytest.mark.parametrize("name", READY)
def test_every_recipe_plans_everywhere(name: str, recipe: str) -> None:
    plan = make_plan(name, recipe)
    assert plan.recipe.name == recipe and plan.recipe.steps and plan.recipe.solver and plan.recipe.schedule


@pytest.mark.parametrize("name", READY)
def test_headlines_are_among_the_metrics(name: str) -> None:
    prompts = [PROMPTS.get(name, "a red apple")] * (2 if name == "3d" else 8)  # objects take long, and are not sets
    options = SHORT.get(name, {})
    with Engine(make_plan(name, "fast", overrides=Recipe(steps=2))) as engine:
        artifacts = engine.generate_batch(prompts, range(len(prompts)), options=options).artifacts
        found = engine.modality.metrics(artifacts, prompts)
        headline = engine.modality.headline
    assert headline and set(headline) <= set(found) and set(headline.values()) <= {1, -1}
    assert all(math.isfinite(found[metric]) for metric in headline)
