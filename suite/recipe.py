"""Recipes: which plugins act, with which options. One grammar on the command line and in YAML.

`name` or `name:key=value,key=value`; a sequence value is written `1/2/3`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.files.inputs import read_yaml
from suite.files.printable import short
from suite.hookspecs import HOOKS
from suite.host.bounds import MAX_STEPS
from suite.host.suggest import nearest

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Named:
    """A plugin with its options, as a recipe names it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Named:
        """`name:key=value,key=value`.

        Raises:
            ConfigError: the text does not have this form.
        """
        name, colon, rest = text.strip().partition(":")
        options: dict[str, Any] = {}
        for part in rest.split(",") if colon else ():
            key, equals, value = part.partition("=")
            if not (key.strip() and equals and value.strip()):
                raise ConfigError(f"plugin {text!r}: expected name:key=value,key=value; got {part!r}")
            if key.strip() in options:
                raise ConfigError(f"plugin {text!r}: option {key.strip()!r} is given twice")
            options[key.strip()] = value.strip()
        if not name:
            raise ConfigError(f"plugin {text!r}: the name is missing; expected name:key=value,key=value")
        return Named(name, options)

    def __str__(self) -> str:
        options = ",".join(f"{k}={_text(v)}" for k, v in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def _text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Recipe:
    """Everything about how to generate, but not what.

    None means: not said; the modality's default fills it in.
    """

    name: str = "custom"
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    dtype: str | None = None
    schedule: Named | None = None
    solver: Named | None = None
    compress: tuple[Named, ...] = ()
    parallelize: tuple[Named, ...] = ()
    cache: tuple[Named, ...] = ()

    def __post_init__(self) -> None:
        if self.steps is not None and not (type(self.steps) is int and 1 <= self.steps <= MAX_STEPS):
            raise ConfigError(f"steps = {short(self.steps)}: expected a whole number from 1 to {MAX_STEPS}")
        if self.dtype not in (None, "auto", "bf16", "fp32"):
            raise ConfigError(f"dtype = {self.dtype!r}: expected auto, bf16 or fp32")
        number = isinstance(self.guidance, int | float) and not isinstance(self.guidance, bool)
        if self.guidance is not None and not (number and 0 <= self.guidance <= 100):
            raise ConfigError(f"guidance = {short(self.guidance)}: expected a number from 0 to 100 (1 means none)")
        if self.guidance_interval is not None:
            _check_interval(self.guidance_interval)

    def named(self) -> Iterator[tuple[str, Named]]:
        """(hook, plugin) in the host's order."""
        for hook in HOOKS:
            value = getattr(self, hook)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None:
                    yield hook, item

    def over(self, base: Recipe) -> Recipe:
        """This recipe on top of `base`: what is not said here is taken from there; lists are not merged.

        The name `none` alone empties a list of `base`.
        """
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) not in (None, ())}
        return replace(base, **{k: () if v == (Named("none"),) else v for k, v in said.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data which `from_dict` reads back."""
        out: dict[str, Any] = {}
        for key, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if value in (None, ()):
                continue
            if isinstance(value, Named):
                out[key] = str(value)
            elif isinstance(value, tuple):
                out[key] = [str(v) if isinstance(v, Named) else v for v in value]
            else:
                out[key] = value
        return out

    @staticmethod
    def from_dict(data: Mapping[str, Any], modality: str | None = None, tokens: bool = False) -> Recipe:
        """Read a recipe; `modalities: {NAME: {...}}` overrides for one modality, then `tokens: {...}` for token models.

        One recipe so serves every modality, though what steps real vectors cannot step tokens.

        Raises:
            ConfigError: unknown key or a value of the wrong kind.
        """
        known = {f.name for f in fields(Recipe)}
        if not isinstance(data, Mapping):
            raise ConfigError(f"recipe: expected a mapping like `steps: 20`, got {type(data).__name__}")
        content = dict(data)
        sections = content.pop("modalities", {}) or {}
        discrete = content.pop("tokens", {}) or {}
        content.pop("summary", None)
        if not isinstance(discrete, Mapping):
            raise ConfigError("recipe: tokens must be a section like `tokens: {solver: NAME}`")
        if not isinstance(sections, Mapping) or any(not isinstance(s, Mapping) for s in sections.values()):
            raise ConfigError("recipe: modalities must map names to sections, like `modalities: {image: {steps: 8}}`")
        if modality and modality in sections:
            content |= sections[modality]
        if tokens:
            content |= discrete
        for key in content:
            if key not in known:
                raise ConfigError(f"recipe: unknown key {key!r}{nearest(key, known) or f'; known: {sorted(known)}'}")
        for key in ("schedule", "solver"):
            if content.get(key) is not None:
                content[key] = Named.parse(_string(key, content[key]))
        for key in ("compress", "parallelize", "cache"):
            value = content.get(key) or []
            if isinstance(value, str):
                value = [value]
            if not isinstance(value, list | tuple):
                raise ConfigError(f"recipe: {key} must be a list of texts like name:key=value, got {value!r}")
            content[key] = tuple(Named.parse(_string(key, v)) for v in value)
        if content.get("guidance_interval") is not None:
            try:
                low, high = content["guidance_interval"]
                content["guidance_interval"] = (float(low), float(high))
            except (TypeError, ValueError, OverflowError):
                got = content["guidance_interval"]
                raise ConfigError(
                    f"recipe: guidance_interval = {short(got)}: expected two times like [0.0, 1.0]"
                ) from None
        return Recipe(**content)


def _check_interval(interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"guidance_interval = {short(low)},{short(high)}: expected two times with 0 <= low <= high <= 1"
        )


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"recipe: {key} must be text like name:key=value, got {value!r}")
    return value


def shipped() -> dict[str, Path]:
    """Recipes that come with the suite, by name."""
    return {p.stem: p for p in sorted((CONFIGS / "recipes").glob("*.yaml"))}


def read(name_or_path: str, modality: str | None = None, tokens: bool = False) -> Recipe:
    """A shipped recipe by name, or a YAML file.

    Raises:
        ConfigError: neither exists, or the file is not a recipe.
    """
    known = shipped()
    path = known.get(name_or_path) or Path(name_or_path)
    if not os.path.exists(path):
        raise ConfigError(
            f"no recipe {name_or_path!r}{nearest(name_or_path, known)}; "
            f"shipped: {', '.join(known)}, or give a YAML file"
        )
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path}: expected a mapping like `steps: 20`, got {type(data).__name__}")
    return Recipe.from_dict({"name": path.stem} | data, modality, tokens)


def from_options(
    *,
    schedule: str | None = None,
    solver: str | None = None,
    compress: Sequence[str] = (),
    parallelize: Sequence[str] = (),
    cache: Sequence[str] = (),
    **rest: Any,
) -> Recipe:
    """A recipe from command-line texts."""
    return Recipe(
        schedule=Named.parse(schedule) if schedule else None,
        solver=Named.parse(solver) if solver else None,
        compress=tuple(map(Named.parse, compress)),
        parallelize=tuple(map(Named.parse, parallelize)),
        cache=tuple(map(Named.parse, cache)),
        **rest,
    )
