"""Checks of every plugin."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
import typing

import yaml

from suite.errors import ConfigError
from suite.hookspecs import HOOKS, PROJECT, SINGLE
from suite.host.manager import implemented_hooks
from suite.plugin import EFFECT_WORDS, Plugin, build, options_of, path_options
from suite.recipe import Named, Recipe
from suite.testing.checks.subject import Subject, common

#: Words of an option's name by which it seems to name a file or a folder.
PATH_WORDS = {"path", "file", "folder", "store", "dir", "directory", "checkpoint"}
#: Importing a plugin's module must not import these.
HEAVY = ("torch", "diffusers", "transformers", "triton")


@common
def check_is_a_plugin(subject: Subject) -> None:
    """A frozen dataclass below `Plugin`, with a summary, that implements a hook."""
    cls = subject.cls
    assert issubclass(cls, Plugin), f"{cls.__name__} is not a subclass of suite.Plugin"
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert frozen, f"{cls.__name__} is not a frozen dataclass; write @dataclass(frozen=True)"
    assert cls.summary, "`summary` is empty; `suite plugins list` shows it"
    assert implemented_hooks(cls), f"it implements none of {', '.join(HOOKS)}; mark a method with @hookimpl"
    modalities = cls.modalities
    assert modalities is None or isinstance(modalities, frozenset), "`modalities` must be None or a frozenset"
    if SINGLE.issuperset(implemented_hooks(cls)):
        assert not subject.plugin.lossless, "`lossless` means nothing of a schedule or a solver; leave it out"


@common
def check_registers(subject: Subject) -> None:
    """pluggy accepts it, and no marked method is left without a hook."""
    for hook in implemented_hooks(subject.cls):
        subject.manager(hook)


@common
def check_hook_arguments_have_no_defaults(subject: Subject) -> None:
    """An argument with a default is never filled by pluggy."""
    for name in dir(subject.cls):
        method = getattr(subject.cls, name, None)
        if getattr(method, f"{PROJECT}_impl", None) is None:
            continue
        for argument in inspect.signature(method).parameters.values():  # pyright: ignore[reportArgumentType]
            assert argument.default is inspect.Parameter.empty, (
                f"{name}({argument.name}={argument.default!r}): pluggy never fills an argument that has a default; "
                "make it an option of the plugin"
            )


@common
def check_import_is_light(subject: Subject) -> None:
    """Listing and checking a recipe import the module, so it must not import torch."""
    module = subject.cls.__module__
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"import {module} fails in a fresh process: {done.stderr.strip()[-500:]}"
    assert not done.stdout.split(), (
        f"import {module} imports {done.stdout.strip()}; import it inside the hook, or under TYPE_CHECKING"
    )


@common
def check_options_round_trip(subject: Subject) -> None:
    """Options written as text and as YAML are read back equal; an unknown one is refused."""
    cls, values = subject.cls, {k: getattr(subject.plugin, k) for k in options_of(subject.cls)}
    # An empty text or sequence cannot be written; leaving the option out says it.
    written = {k: v for k, v in values.items() if not (isinstance(v, str | list | tuple) and not v)}
    named = Named.parse(str(Named(subject.name, written)))
    assert build(cls, named.options, name=subject.name) == subject.plugin, f"{named} is read back differently"
    for hook in implemented_hooks(cls):
        value = str(named) if hook in ("schedule", "solver") else [str(named)]
        recipe = Recipe.from_dict(yaml.safe_load(yaml.safe_dump({hook: value})))
        again = Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
        ((_, read),) = again.named()
        assert build(cls, read.options, name=subject.name) == subject.plugin, f"YAML {value!r} is read back differently"
    try:
        build(cls, {"no_such_option": 1}, name=subject.name)
    except ConfigError as error:
        assert "no_such_option" in str(error), f"the refusal of an unknown option does not name it: {error}"
    else:
        raise AssertionError("the unknown option no_such_option is accepted")


@common
def check_paths_are_declared(subject: Subject) -> None:
    """An option whose name looks like a path has the type `PathOption`, so that recipes of others cannot set it."""
    declared = path_options(subject.cls)
    for name, (kind, _) in options_of(subject.cls).items():
        text = kind is str or str in typing.get_args(kind)
        if text and not declared.get(name) and PATH_WORDS & set(name.lower().split("_")):
            raise AssertionError(f"the option {name} seems to name a path; declare it as `{name}: PathOption`")


@common
def check_bench_options_can_be_built(subject: Subject) -> None:
    """Each setting that it asks `suite bench` to measure is one, and can be written as text."""
    for options in subject.cls.bench_options if "bench_options" in vars(subject.cls) else ():
        named = Named.parse(str(Named(subject.name, options)))
        try:
            build(subject.cls, named.options, name=subject.name)
        except ConfigError as error:
            raise AssertionError(f"its bench_options hold {named}, which it refuses: {error}") from error


@common
def check_effects_are_known(subject: Subject) -> None:
    """Words are of the suite's list, or one's own with a dot, so that rules can match them."""
    effects = subject.plugin.effects
    assert isinstance(effects, frozenset), f"`effects` must be a frozenset, got {type(effects).__name__}"
    unknown = sorted(w for w in effects if w not in EFFECT_WORDS and "." not in w)
    assert not unknown, f"unknown effect {unknown[0]!r}; known: {', '.join(EFFECT_WORDS)}; a word of your own has a dot"
