"""`Plugin`: the base of every plugin, and how its options are read from text."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

if TYPE_CHECKING:
    from suite.host.models import ModelFolder
    from suite.recipe import Recipe

from suite.errors import ConfigError
from suite.files.printable import short
from suite.host.bounds import LARGEST

#: The words a plugin may use in `effects`: what it reads, writes, needs and changes.
EFFECT_WORDS: dict[str, str] = {
    "weights": "replaces weights for good; the network is loaded again to undo it",
    "block-outputs": "replaces the outputs of blocks or of their parts",
    "stage-outputs": "replaces the outputs of whole stages of a U-Net",
    "frozen-outputs": "gives the same outputs from some step to the end of the run, however old they are",
    "denoiser-output": "replaces or forecasts the denoiser's output",
    "trajectory": "changes which states the sampler visits",
    "time-grid": "decides the times",
    "optimised-grid": "brings times that were fitted to one solver and one number of steps",
    "call-count": "changes how often the network runs",
    "batch-axis": "uses the batch axis for something else than samples",
    "branch-axis": "places guidance branches on different ranks",
    "patch-axis": "places parts of one sample on different ranks",
    "pipeline-stages": "places blocks on different ranks",
    "stale-activations": "computes with activations of an earlier step",
    "dynamic-decision": "decides from the data whether to compute",
    "step-reuse": "assumes that neighbouring steps are alike",
    "exact-reuse": "reuses only what is equal",
    "low-bit": "computes with quantised numbers",
    "adapter": "adds low-rank or side weights",
    "needs-deterministic-step": "is wrong with a solver that draws noise",
    "needs-fixed-grid": "needs the times before the run",
    "ends-guidance": "leaves only the conditional branch from some step on",
    "side-residuals": "adds residuals of another network to the stages of a U-Net",
    "needs-guidance": "acts on guidance branches",
    "stochastic-step": "draws noise during the run",
    "multistep": "carries past evaluations",
    "adaptive-grid": "picks its own times",
    "repeated-evaluations": "evaluates more than once a step",
    "variable-evaluations": "decides from the data how often it evaluates",
    "counts-steps": "decides from how many steps of the run are done",
    "denoiser-switch": "hands some evaluations to another network",
    "time-jumps": "goes back to noisier times",
    "needs-tokens": "works on tokens alone",
    "token-states": "keeps keys and values of tokens",
    "trajectory-store": "keeps states of runs for later runs",
}


class Plugin:
    """Subclass as a frozen dataclass of options, mark methods with `@hookimpl`, register one entry point.

    Class attributes (any may be a property that depends on the options):
        summary: one line for `suite plugins list`.
        paper: paper and equation or section.
        orders: of a solver: its order of convergence, or a range that its options choose from, like `1-4`.
        modalities: names it works for; None means all.
        lossless: of compress, parallelize and cache: bit-identical, or within 1.5x of the baseline's own rounding
            error against float64. A grid and a solver are other ways to sample, and say nothing.
        effects: words of `EFFECT_WORDS` and words of your own (with a dot, `vendor.word`).
        rules: rules of your own about the words of the active chain.
        bench_options: settings that `suite bench` measures when it is not told which, from careful to bold; by
            default the plugin's defaults alone, and none if the plugin has nothing of its own to measure.

    For the conformance kit alone:
        noop_options: options with which the plugin must change nothing; empty if there are none.
        acting_options: options with which a `Wrap` is sure to act on the kit's tiny network.
        kit_network: the tiny network on which a `Wrap` is tried, `transformer` or `unet`.
        batch_tolerance: largest difference, relative to the largest output, between a sample in a batch and
            the sample alone.
    """

    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    orders: ClassVar[str] = ""
    modalities: ClassVar[frozenset[str] | None] = None
    lossless: bool = False
    effects: frozenset[str] = frozenset()
    rules: ClassVar[tuple[Any, ...]] = ()
    bench_options: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    noop_options: ClassVar[dict[str, Any]] = {}
    acting_options: ClassVar[dict[str, Any]] = {}
    kit_network: ClassVar[Literal["transformer", "unet"]] = "transformer"
    batch_tolerance: ClassVar[float] = 1e-4

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        """Refuse a complete request that these options cannot serve, before torch or the model is loaded.

        Raises:
            ConfigError: what does not fit, and what would.
        """


@dataclasses.dataclass(frozen=True)
class NamesPath:
    """Marks an option that names a file or a folder; see `suite.host.path_options` for what follows from it.

    Attributes:
        shipped: the folder of `suite/configs` whose names it takes too, such as `grids`; these lead nowhere else.
        names: further words that it takes.
    """

    shipped: str = ""
    names: tuple[str, ...] = ()


PathOption = Annotated[str, NamesPath()]
"""The type of an option that names a file or a folder: a recipe that somebody else wrote may not set it."""


def path_options(cls: type) -> dict[str, NamesPath]:
    """The options of a plugin class that name files or folders."""
    hints = typing.get_type_hints(cls, include_extras=True) if dataclasses.is_dataclass(cls) else {}
    found = {f.name: _marker(hints[f.name]) for f in dataclasses.fields(cls)} if hints else {}
    return {name: marker for name, marker in found.items() if marker is not None}


def _marker(annotation: Any) -> NamesPath | None:
    """The marker of an annotation or of a part of it, as in `PathOption | None`."""
    marks = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, NamesPath)]
    inside = (m for part in typing.get_args(annotation) if (m := _marker(part)))
    return marks[0] if marks else next(inside, None)


def options_of(cls: type) -> dict[str, tuple[Any, Any]]:
    """Option name -> (type, default) of a plugin class, in order."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        out[f.name] = (hints[f.name], default)
    return out


def build(cls: type, options: Mapping[str, Any], *, name: str) -> Any:
    """An instance of plugin class `cls` with `options` converted to the declared types.

    Raises:
        ConfigError: unknown option (with the nearest names), wrong type, or refused by the plugin itself.
    """
    from suite.host.suggest import nearest

    known = options_of(cls)
    values = {}
    for key, raw in options.items():
        field = key.replace("-", "_")
        if field not in known:
            hint = nearest(field, known) or (f"; its options: {', '.join(known)}" if known else "; it has no options")
            raise ConfigError(f"plugin {name}: unknown option {key!r}{hint}")
        try:
            values[field] = convert(raw, known[field][0])
        except ValueError as error:
            raise ConfigError(f"plugin {name}: option {key}={short(raw, 200)}: {error}") from None
    missing = [k for k, (_, default) in known.items() if default is dataclasses.MISSING and k not in values]
    if missing:
        raise ConfigError(f"plugin {name}: option {missing[0]!r} is required; write {name}:{missing[0]}=...")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plugin {name}: {error}") from error


def convert(raw: Any, annotation: Any) -> Any:
    """`raw` (text or a YAML value) as `annotation`; ValueError says what was expected."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null")):
            if type(None) in arguments:
                return None
        inner = [a for a in arguments if a is not type(None)]
        for candidate in inner:
            try:
                return convert(raw, candidate)
            except ValueError:
                if candidate is inner[-1]:
                    raise
    if raw is None:
        raise ValueError("expected a value")
    if origin is typing.Literal:
        for choice in arguments:
            # Text says a number by its digits; True is not 1.
            if (raw == choice and type(raw) is type(choice)) or raw == str(choice):
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if not isinstance(raw, str | list | tuple):
            raise ValueError("expected values separated by '/'")
        parts = [p for p in raw.split("/") if p] if isinstance(raw, str) else list(raw)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(p, arguments[0]) for p in parts)
        if len(parts) != len(arguments):
            raise ValueError(f"expected {len(arguments)} values separated by '/'")
        return tuple(convert(p, a) for p, a in zip(parts, arguments, strict=True))
    if annotation is bool:
        truth = {
            "true": True,
            "yes": True,
            "1": True,
            "on": True,
            "false": False,
            "no": False,
            "0": False,
            "off": False,
        }
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in truth:
            return truth[raw.lower()]
        raise ValueError("expected true or false")
    if annotation in (int, float):
        return _number(raw, annotation)
    if annotation is str:
        return str(raw)
    return raw


def _number(raw: Any, kind: type[int] | type[float]) -> int | float:
    expected = "expected a whole number" if kind is int else "expected a number"
    if isinstance(raw, bool):
        raise ValueError(expected)
    try:
        value = kind(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(expected) from None
    if isinstance(raw, float) and raw != value:
        raise ValueError(expected)
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < LARGEST):
        raise ValueError(f"{expected} below 2**63")
    return value
