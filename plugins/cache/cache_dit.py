"""cache-dit's dual block cache, put into networks that are chains of blocks."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.call import active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.chain import OTHERWISE, argument_names, chain_of
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._shared import held_within
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import nn

    from suite.network import BlockRef, Network
    from suite.run import Run

UNIT = "network calls in which the blocks between were skipped"
PICTURE, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass
class _Library:
    """The library's forward for each branch and evaluation, and the network as it was.

    It counts calls of the network and takes each for a step, so each branch and evaluation gets a cache of its own.
    """

    module: nn.Module
    lists: list[nn.ModuleList]
    pattern: str
    config: dict[str, Any]
    before: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    forwards: dict[tuple[str, int], Callable[..., Any]] = field(default_factory=dict)
    managers: list[Any] = field(default_factory=list)
    calls: int = 0
    peak: int = 0
    over: bool = False

    def root(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The network: hands the call to the cache of its branch and evaluation."""

        def run(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            key = (call.key, call.evaluation)
            if key not in self.forwards:
                self.forwards[key] = self._enabled(forward)
            self.calls += 1
            try:
                return self.forwards[key](*args, **kwargs)
            except AttributeError as error:
                if "CachedBlocks" not in str(error):
                    raise
                raise ConfigError(
                    f"cache-dit stands in for the blocks of {type(self.module).__name__}, which reads more of "
                    f"them than their output: {error}; {OTHERWISE}"
                ) from error

        return run

    def _enabled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        import cache_dit

        _silence()
        patched: Any = self.module.__dict__["forward"]
        self.module.forward = forward
        self.module.__dict__.pop("_is_cached", None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it looks at every attribute, the deprecated ones too
                adapter = cache_dit.BlockAdapter(
                    transformer=self.module,
                    blocks=self.lists,
                    forward_pattern=[cache_dit.ForwardPattern[self.pattern]] * len(self.lists),
                    check_forward_pattern=False,
                    has_separate_cfg=False,
                )
        except AssertionError as error:
            name = type(self.module).__name__
            raise ConfigError(f"cache-dit does not find the blocks of {name}: {error}; {OTHERWISE}") from error
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(**self.config, enable_separate_cfg=False))
        enabled = self.module.forward
        self.managers.append(self.module.__dict__["_context_manager"])
        self.module.forward = patched
        return enabled

    def remember(self) -> None:
        self.before = [(part, {**part.__dict__, "_modules": dict(part._modules)}) for part in self.module.modules()]

    def undo(self) -> None:
        """Every attribute and child of every part is what it was: the library puts children back in another order."""
        for part, attributes in self.before:
            for name in part.__dict__.keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
        self.forwards.clear()
        self.over = True

    def held(self) -> int:
        """Bytes in the library's buffers; what it kept is dropped with the network's attributes."""
        if self.over:
            return 0
        contexts = [c for manager in self.managers for c in manager._cached_context_manager.values()]
        now = held_within([context.buffers for context in contexts])
        self.peak = max(self.peak, now)
        return now

    def skipped(self) -> list[int]:
        """Calls in which blocks were skipped, of each branch and evaluation."""
        counts = []
        for manager in self.managers:
            contexts = manager._cached_context_manager.values()
            counts.append(min(len(context.get_cached_steps()) for context in contexts))
        return counts


@dataclass(frozen=True)
class CacheDiT(Plugin):
    """DBCache of cache-dit: the first `front` and last `back` blocks always run, those between while r changes.

    r is what the first blocks add; the blocks between are skipped if mean|r - r'| / mean|r'| < threshold, r' being
    that of the last computed call, and what they added then is added. With front = 1 and back = 0 it is
    `first-block`, decided for the whole batch.

    Args:
        threshold: largest relative change; 0 computes everything.
        front, back: blocks at either end that always run.
        warmup: first calls that are always computed.
        max_consecutive: most calls in a row that are skipped; none is no limit.

    Raises:
        ConfigError: from the hook: the library is missing, or the network is no chain of blocks that it knows.
    """

    threshold: float = 0.08
    front: int = 1
    back: int = 0
    warmup: int = 4
    max_consecutive: int | None = None

    summary = "cache-dit's DBCache: skip the blocks between the first and the last ones"
    paper = "cache-dit, DBCache"
    effects = frozenset({"block-outputs", "step-reuse", "dynamic-decision"})
    noop_options: ClassVar[dict[str, Any]] = {"threshold": 0.0}
    acting_options: ClassVar[dict[str, Any]] = {"threshold": 0.5, "warmup": 1}

    def __post_init__(self) -> None:
        for option, least in (("threshold", 0), ("front", 1), ("back", 0), ("warmup", 0)):
            if not getattr(self, option) >= least:
                raise ConfigError(
                    f"cache-dit: {option} = {getattr(self, option)}: expected at least {least}, e.g. "
                    "cache-dit:threshold=0.08,front=1"
                )
        if self.max_consecutive is not None and self.max_consecutive < 1:
            raise ConfigError(f"cache-dit: max_consecutive = {self.max_consecutive}: expected at least 1, or none")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.threshold == 0

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        from suite.network.patch import Patches

        try:
            importlib.import_module("cache_dit")
        except ImportError as error:
            raise ConfigError(
                "cache-dit needs the package cache-dit, which is not installed. Type: pip install cache-dit; or take "
                "--cache first-block"
            ) from error
        refs = chain_of(network, "cache-dit")
        lists = list(dict.fromkeys(ref.name.rpartition(".")[0] for ref in refs))
        fewest = min(sum(ref.name.startswith(name + ".") for ref in refs) for name in lists)
        if self.front + self.back >= fewest:
            raise ConfigError(
                f"cache-dit: front + back = {self.front + self.back}: expected less than {fewest}, because "
                f"{found(network)} and it caches each list of blocks apart"
            )
        pattern = _pattern(refs[0])
        if self.threshold == 0:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="threshold = 0 computes all; take e.g. 0.08"))
        config = {
            "Fn_compute_blocks": self.front,
            "Bn_compute_blocks": self.back,
            "residual_diff_threshold": self.threshold,
            "max_warmup_steps": self.warmup,
            "max_continuous_cached_steps": self.max_consecutive or -1,
            "num_inference_steps": run.steps,
        }
        held: Any = [network.module.get_submodule(name) for name in lists]
        library, patches = _Library(network.module, held, pattern, config), Patches()

        def install(module: nn.Module) -> nn.Module:
            library.remember()
            patches.replace(module, library.root)
            return module

        def undo() -> None:
            library.held()
            patches.undo()
            library.undo()
            for manager in library.managers:
                for context in manager._cached_context_manager.values():
                    context.clear_buffers()

        def report() -> WrapReport:
            did = sum(library.skipped())
            share = did / max(1, library.calls) * (1 - (self.front + self.back) * len(lists) / len(refs))
            facts = reuse(
                hits=did,
                misses=library.calls - did,
                skipped_share=share,
                bytes_held=max(library.peak, library.held()),
                calls=library.calls,
                skipped=library.skipped(),
            )
            reason = f"none of {library.calls} calls was within threshold = {self.threshold:g}; raise it"
            if not library.calls:
                reason = "this model's parts are called one by one, and never the network's forward, which it replaces"
            return WrapReport(did, UNIT, facts, "" if did else reason)

        return Wrap(report=report, network=install, undo=undo, held=library.held)


def _silence() -> None:
    """It says what it does at every step, where results are printed."""
    for name in ["CACHE_DIT", *logging.root.manager.loggerDict]:
        if name.lower().startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _pattern(ref: BlockRef) -> str:
    """How the blocks are called and what they return, in the library's terms."""
    names = argument_names(ref.module)
    if ref.hidden == (PICTURE, TEXT):
        return "Pattern_0"
    if ref.hidden == (TEXT, PICTURE):
        return "Pattern_1"
    if ref.hidden == (PICTURE,):
        return "Pattern_2" if names[1:2] == [TEXT] else "Pattern_3"
    raise ConfigError(
        f"cache-dit knows blocks that carry {PICTURE} and {TEXT}, but {ref.name} carries {', '.join(ref.hidden)}; "
        f"{OTHERWISE}"
    )
