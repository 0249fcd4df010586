"""diffusers' own caches, put into any network that they know: references for ours, and what its users have."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from suite.call import active_call
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._shared import held_within
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.network import Network
    from suite.run import Run

UNIT = "calls that the library's hooks answered"
OTHERWISE = "take ours: fora, first-block or pab"
REGISTRY = "_diffusers_hook"
PARTS = ("attention", "cross_attention", "temporal_attention", "mlp")


@dataclass
class _Hooks:
    """The library's hooks in one network for one run, and how to take every trace of them out."""

    module: nn.Module
    title: str
    before: list[tuple[nn.Module, Any]] = field(default_factory=list)
    #: PAB keeps one state and counts its calls, so each branch and evaluation is lent a state of its own.
    states: dict[tuple[str, int], dict[int, Any]] = field(default_factory=dict)
    calls: int = 0
    computed: int = 0
    parts: int = 0
    peak: int = 0

    def apply(self, put_in: Callable[[nn.Module], None]) -> None:
        """Remember the network as it is, and let the library put its hooks in.

        Raises:
            ConfigError: it does not know this class, or found nothing to hook.
        """
        if taken := next((part for part in self.module.modules() if REGISTRY in part.__dict__), None):
            raise ConfigError(
                f"{self.title}: {type(taken).__name__} has hooks of diffusers (a cache, offloading); remove them first"
            )
        self.before = [(part, part.__dict__.get("forward")) for part in self.module.modules()]
        try:
            put_in(self.module)
        except (ValueError, IndexError, AttributeError) as error:
            self.undo()
            raise ConfigError(
                f"{self.title}: diffusers cannot put it into {type(self.module).__name__}: {error}; {OTHERWISE}"
            ) from error
        for reference in self._references():
            reference.original_forward = self._counted(reference.original_forward, "computed")
            reference.forward = self._counted(reference.forward, "calls")
            self.parts += 1

    def _hooked(self) -> list[Any]:
        registries = [part.__dict__[REGISTRY] for part in self.module.modules() if REGISTRY in part.__dict__]
        return [hook for registry in registries for hook in registry.hooks.values()]

    def _references(self) -> list[Any]:
        return [hook.fn_ref for hook in self._hooked() if hook.fn_ref.original_forward is not None]

    def _counted(self, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return forward(*args, **kwargs)

        return run

    def during(self, call: Call, evaluate: Callable[[], Any]) -> Any:
        """Evaluate, while the hooks are told which branch and evaluation this is, which they cannot know.

        Raises:
            ConfigError: a hook does not fit what it got.
        """
        from diffusers.models.cache_utils import CacheMixin

        mine = self.states.setdefault((call.key, call.evaluation), {})
        for index, hook in enumerate(h for h in self._hooked() if hasattr(h, "state")):
            hook.state = mine.setdefault(index, type(hook.state)())
        try:
            with CacheMixin.cache_context(self.module, f"{call.key}/{call.evaluation}"):  # pyright: ignore[reportArgumentType]
                return evaluate()
        except Exception as error:
            if not _raised_by_hooks(error):
                raise
            raise ConfigError(
                f"{self.title}: diffusers' hook does not fit {type(self.module).__name__}: "
                f"{type(error).__name__}: {error}; {OTHERWISE}"
            ) from error

    def root(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The network's forward."""
        return lambda *args, **kwargs: self.during(active_call(), lambda: forward(*args, **kwargs))

    def undo(self) -> None:
        """Every forward is what it was, and no registry is left."""
        for part, forward in self.before:
            part.__dict__.pop(REGISTRY, None)
            if forward is None:
                part.__dict__.pop("forward", None)
            else:
                part.forward = forward
        self.states.clear()

    def held(self) -> int:
        """Bytes in the states of the hooks: those that are lent, and those that the library keeps by context."""
        managers = [hook.state_manager._state_cache for hook in self._hooked() if hasattr(hook, "state_manager")]
        now = held_within(self.states, managers)
        self.peak = max(self.peak, now)
        return now


@dataclass(frozen=True)
class _Told:
    """Also tells the hooks where a modality calls parts of the network, and never its forward."""

    inner: Denoiser
    hooks: _Hooks = field(repr=False, compare=False)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        return self.hooks.during(call, lambda: self.inner.denoise(x, t, cond, call))


def _raised_by_hooks(error: BaseException) -> bool:
    """Whether it came up in the library's hooks themselves, and not in the layers that they call."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return bool(trace) and trace.tb_frame.f_globals.get("__name__", "").startswith("diffusers.hooks")


@dataclass(frozen=True)
class DiffusersCache(Plugin):
    """First-block cache, TaylorSeer, pyramid attention broadcast and MagCache as diffusers has them.

    What they are told by us: which branch and evaluation a call belongs to, the time (PAB), and the parts of the
    network (TaylorSeer, whose own patterns miss most classes). They decide for a whole batch, and TaylorSeer, PAB and
    MagCache count their calls instead of steps, so in a run in which a branch is missing for some steps they go on
    where they were. FasterCache is not among them: it splits the batch itself and wants `uncond` first.

    Args:
        name: `first-block`, `taylorseer`, `pab` or `mag`.
        interval: of TaylorSeer and PAB: every N-th call computes.
        threshold: of first-block and MagCache.
        order: of TaylorSeer: order of its forecast, 0 reuses.
        warmup: of TaylorSeer: first calls that are always computed.
        start, end: of PAB: times (from 1 down to 0) between which it reuses, `end < t < start`.
        ratios: of MagCache: magnitude ratios that were measured for this model.

    Raises:
        ConfigError: from the hook: diffusers is missing, or does not know this class of network.
    """

    name: Literal["first-block", "taylorseer", "pab", "mag"] = "taylorseer"
    interval: int = 2
    threshold: float = 0.1
    order: int = 1
    warmup: int = 3
    start: float = 0.8
    end: float = 0.1
    ratios: tuple[float, ...] = ()

    summary = "diffusers' own caches: first-block, taylorseer, pab, mag"
    paper = "diffusers.hooks"
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        for option, least in (("interval", 1), ("threshold", 0), ("order", 0), ("warmup", 1)):
            if getattr(self, option) < least:
                raise ConfigError(
                    f"diffusers-cache: {option} = {getattr(self, option)}: expected at least {least}, e.g. "
                    "diffusers-cache:name=taylorseer,interval=2"
                )
        if not 0 <= self.end < self.start <= 1:
            raise ConfigError(
                f"diffusers-cache: start = {self.start}, end = {self.end}: expected times from 1 (noise) to 0 (data), "
                "start first"
            )
        if self.name == "mag" and not self.ratios:
            raise ConfigError(
                "diffusers-cache: name = mag needs ratios that were measured for this model, e.g. ratios=1/1.02/0.98"
            )

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        words = {"block-outputs", "step-reuse"}
        return frozenset(words | {"dynamic-decision"} if self.name == "first-block" else words)

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        from suite.network.patch import Patches

        try:
            importlib.import_module("diffusers.hooks")
        except ImportError as error:
            raise ConfigError(
                "diffusers-cache needs diffusers, which is not installed. Type: pip install diffusers"
            ) from error
        title = f"diffusers-cache:name={self.name}"
        hooks, patches = _Hooks(network.module, title), Patches()

        def install(module: nn.Module) -> nn.Module:
            hooks.apply(lambda m: self._put_in(m, network, run.steps))
            if not hooks.parts:
                hooks.undo()
                raise ConfigError(f"{title} found nothing to hook: {found(network)}; drop it")
            patches.replace(module, hooks.root)
            return module

        def undo() -> None:
            hooks.held()
            patches.undo()
            hooks.undo()

        def report() -> WrapReport:
            did = hooks.calls - hooks.computed
            facts = reuse(
                hits=did,
                misses=hooks.computed,
                skipped_share=did / max(1, hooks.calls),
                bytes_held=max(hooks.peak, hooks.held()),
                name=self.name,
                hooked=hooks.parts,
            )
            return WrapReport(did, UNIT, facts, "" if did else f"the library computed all of {hooks.calls} calls")

        return Wrap(
            report=report,
            network=install,
            denoiser=lambda inner: _Told(inner, hooks),
            undo=undo,
            held=hooks.held,
        )

    def _put_in(self, module: nn.Module, network: Network, steps: int) -> None:
        from diffusers import hooks

        if self.name == "first-block":
            hooks.apply_first_block_cache(module, hooks.FirstBlockCacheConfig(threshold=self.threshold))
        elif self.name == "taylorseer":
            import torch

            config = hooks.TaylorSeerCacheConfig(
                cache_interval=self.interval,
                disable_cache_before_step=self.warmup,
                max_order=self.order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[re.escape(part.name) for part in network.blocks(*PARTS)] or ["(?!)"],
            )
            hooks.apply_taylorseer_cache(module, config)
        elif self.name == "pab":
            window = (1000 * self.end, 1000 * self.start)
            config = hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=self.interval,
                temporal_attention_block_skip_range=self.interval,
                cross_attention_block_skip_range=self.interval,
                spatial_attention_timestep_skip_range=window,  # pyright: ignore[reportArgumentType]
                temporal_attention_timestep_skip_range=window,  # pyright: ignore[reportArgumentType]
                cross_attention_timestep_skip_range=window,  # pyright: ignore[reportArgumentType]
                current_timestep_callback=lambda: 1000 * active_call().t,  # pyright: ignore[reportArgumentType]
            )
            hooks.apply_pyramid_attention_broadcast(module, config)
        else:
            config = hooks.MagCacheConfig(
                threshold=self.threshold,
                num_inference_steps=steps,
                mag_ratios=list(self.ratios),  # pyright: ignore[reportArgumentType]
            )
            hooks.apply_mag_cache(module, config)
