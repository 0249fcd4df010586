"""DeepCache: compute the inner part of a U-Net at some steps, and only its outer layers at the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.chain import argument, argument_names
from suite.network.described import found
from suite.plugin import Plugin
from suite.plugins.cache._outputs import Anchor, Kept, Outputs, centred, every
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import nn

    from suite.network import BlockRef, Network
    from suite.run import Run

UNIT = "network calls that reuse the inner features"
FEATURE = "feature"
OTHERWISE = "use --cache fora or first-block, which need no U-Net, or drop the cache"
SAMPLERS = ("downsamplers", "upsamplers")


@dataclass(frozen=True)
class _Stage:
    """A stage on the way down or up, and which of its layers are outer ones: they run at every step.

    Attributes:
        layers: its residual layers.
        skips: how many skip connections it gives (down) or takes (up).
        start, stop: its outer layers.
        samples: on the way down: its downsampler is outer too.
        slices: of its lists, by name and range, made when they are first needed.
    """

    module: nn.Module
    layers: int
    skips: int
    start: int
    stop: int
    samples: bool = True
    slices: dict[tuple[str, int, int], Any] = field(default_factory=dict, compare=False)

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.layers and self.samples


@dataclass(frozen=True)
class _Plan:
    """The stages of a U-Net, split where skip connection `branch` crosses from the way down to the way up."""

    down: tuple[_Stage, ...]
    mid: tuple[nn.Module, ...]
    up: tuple[_Stage, ...]
    #: The stage on the way up whose input, at its layer `start`, is what is kept.
    border: int

    @property
    def layers(self) -> int:
        return sum(s.layers for s in (*self.down, *self.up))

    @property
    def outer(self) -> int:
        return sum(s.stop - s.start for s in (*self.down, *self.up))


def plan_of(network: Network, branch: int) -> _Plan:
    """Split a U-Net at skip connection `branch`, 0 being the outermost.

    Raises:
        ConfigError: it has no stages of that kind, or not so many skip connections.
    """
    down, mid, up = (network.blocks(kind) for kind in ("down", "mid", "up"))
    wanted = "deepcache looked for a U-Net: stages down_blocks and up_blocks with lists of `resnets`"
    if not down or not up:
        raise ConfigError(f"{wanted}, but {found(network)}; {OTHERWISE}")
    if odd := next((ref for ref in (*down, *up) if not _layers(ref)), None):
        raise ConfigError(f"{wanted}, but {odd.name} ({type(odd.module).__name__}) has none; {OTHERWISE}")
    given = [_layers(ref) + _samples(ref) for ref in down]
    taken = [_layers(ref) for ref in up]
    if 1 + sum(given) != sum(taken) or any(hasattr(ref.module, "skip_conv") for ref in (*down, *up)):
        raise ConfigError(
            f"{wanted}, one skip connection for each layer, but the way down gives {1 + sum(given)} and the way up has "
            f"{sum(taken)} layers; {OTHERWISE}"
        )
    if not branch < sum(taken):
        raise ConfigError(
            f"deepcache: branch = {branch}: expected 0 to {sum(taken) - 1}, because "
            f"{type(network.module).__name__} has {sum(taken)} skip connections"
        )
    if any(getattr(ref.module, "s1", None) is not None for ref in up):
        raise ConfigError("deepcache: FreeU changes features in place, the kept ones too; call disable_freeu() first")
    downs, left = [], branch
    for ref, skips in zip(down, given, strict=True):
        # Skip 0 is the first convolution's, which always runs; `branch` more must be made.
        outer = min(left, skips)
        downs.append(_Stage(ref.module, _layers(ref), skips, 0, min(outer, _layers(ref)), outer == skips))
        left -= outer
    ups, inner = [], sum(taken) - 1 - branch
    for ref, layers in zip(up, taken, strict=True):
        start = min(inner, layers)
        ups.append(_Stage(ref.module, layers, layers, start, layers))
        inner -= start
    border = next(i for i, stage in enumerate(ups) if stage.start < stage.stop)
    return _Plan(tuple(downs), tuple(ref.module for ref in mid), tuple(ups), border)


def _layers(ref: BlockRef) -> int:
    return len(getattr(ref.module, "resnets", ()))


def _samples(ref: BlockRef) -> int:
    return int(getattr(ref.module, "downsamplers", None) is not None)


@contextmanager
def _only(stage: _Stage, start: int, stop: int, samples: bool) -> Iterator[None]:
    """Let the stage's own forward run a part of its layers: it iterates over its lists, so they are shortened.

    A forward of our own would have to be written for each of the library's two dozen kinds of stages.
    """
    from torch import nn

    parts = stage.module._modules
    before = dict(parts)
    for name, child in before.items():
        if name in SAMPLERS:
            parts[name] = child if samples else None
        elif isinstance(child, nn.ModuleList) and len(child) == stage.layers:
            key = (name, start, stop)
            if key not in stage.slices:
                stage.slices[key] = child[start:stop]
            parts[name] = stage.slices[key]
    try:
        yield
    finally:
        parts.update(before)


@dataclass
class _Inner:
    """What is kept of a U-Net in one run, and the network call that is under way."""

    plan: _Plan
    anchor: Anchor
    outputs: Outputs = field(default_factory=Outputs)
    #: What this call reuses; None if it computes everything.
    now: Kept | None = None
    #: This call's features are of use to later ones.
    keeps: bool = True
    foreign: int = 0

    def root(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The whole network: decides, before any stage runs."""
        names = argument_names(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            # ControlNet and adapters add to stages that a reused step would not run.
            self.keeps = not any(v is not None for n, v in given.items() if "additional_residual" in n)
            self.foreign += not self.keeps
            self.now = self.outputs.find(FEATURE, self.anchor if self.keeps else _always)
            return forward(*args, **kwargs)

        return run

    def down(self, stage: _Stage, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = argument_names(stage.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.now is None or stage.whole:
                return forward(*args, **kwargs)
            hidden, made = argument("hidden_states", names, args, kwargs), ()
            if stage.stop:
                with _only(stage, 0, stage.stop, samples=False):
                    hidden, made = forward(*args, **kwargs)
            # Nobody reads the other skips, but the network counts them off.
            return hidden, (*made, *[hidden] * (stage.skips - len(made)))

        return run

    def mid(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = argument_names(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.now is None:
                return forward(*args, **kwargs)
            return argument("hidden_states", names, args, kwargs)

        return run

    def up(self, stage: _Stage, border: bool, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = argument_names(stage.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = argument("hidden_states", names, args, kwargs)
            if not border:
                inner = self.now is not None and stage.start == stage.stop
                return hidden if inner else forward(*args, **kwargs)
            skips = argument("res_hidden_states_tuple", names, args, kwargs)
            outer = stage.layers - stage.start

            def part(start: int, stop: int, hidden: Any, skips: Sequence[Any], samples: bool) -> Any:
                more = {"hidden_states": hidden, "res_hidden_states_tuple": skips}
                rest = [more.pop(n, v) for n, v in zip(names, args, strict=False)]
                with _only(stage, start, stop, samples):
                    return forward(*rest, **{**kwargs, **more})

            # Layers take the skips from the end.
            if self.now is not None:
                return part(stage.start, stage.layers, self.now.output, skips[:outer], True)
            if stage.start:
                hidden = part(0, stage.start, hidden, skips[outer:], False)
            if self.keeps:
                self.outputs.keep(FEATURE, self.anchor, hidden)
            return part(stage.start, stage.layers, hidden, skips[:outer], True)

        return run


def _always(step: int, steps: int) -> int:
    del steps
    return step


@dataclass(frozen=True)
class DeepCache(Plugin):
    """Ma 2024: neighbouring steps share the inner features of a U-Net.

    Let D_i and U_i be the layers on the way down and up that skip connection i joins. At a computed step all run,
    and U_(m+1)'s output, the input of U_m beside its skip, is kept. At the others D_1 .. D_m run, and then
    U_m .. U_1, beginning with the kept feature: x0 still follows x, the time and the text through the outer layers.

    Additional residuals (ControlNet, adapters) enter stages that a reused step does not run, so a call with them is
    computed as a whole and keeps nothing.

    Args:
        interval: N; of T steps ceil(T / N) are computed. 1 computes everything.
        branch: m, the skip connection at which the network is split; 0, the outermost, is fastest.
        center: none spaces the computed steps evenly; a share of the run gathers them about it (the paper's 15 of
            50 steps is 0.3).
        power: how densely, the paper's p; 1 is even.

    Raises:
        ConfigError: from the hook, if the network is no U-Net or has no such skip connection.
    """

    interval: int = 3
    branch: int = 0
    center: float | None = None
    power: float = 1.4

    summary = "U-Nets: reuse the inner features, compute the outer layers; even or centred steps"
    paper = "DeepCache (2312.00858), sections 3.2 and 3.3, equation 9"
    effects = frozenset({"block-outputs", "stage-outputs", "step-reuse"})
    bench_options = ({"interval": 2}, {"interval": 3}, {"interval": 5})
    noop_options: ClassVar[dict[str, Any]] = {"interval": 1}
    kit_network = "unet"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"deepcache: interval = {self.interval}: expected at least 1, e.g. deepcache:interval=3")
        if self.branch < 0:
            raise ConfigError(f"deepcache: branch = {self.branch}: expected 0 or more, 0 being the outermost skip")
        if self.center is not None and not 0 <= self.center < 1:
            raise ConfigError(f"deepcache: center = {self.center}: expected a share of the run from 0 to 1, or none")
        if not 1 <= self.power <= 10:
            raise ConfigError(f"deepcache: power = {self.power}: expected 1 to 10, e.g. deepcache:center=0.3,power=1.4")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.interval == 1

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches

        plan = plan_of(network, self.branch)
        if self.interval == 1:
            return Wrap(report=lambda: WrapReport(0, UNIT, reason="interval = 1 computes all; take 2 or more"))
        even = self.center is None
        anchor = every(self.interval) if even else centred(self.interval, self.center or 0.0, self.power)
        inner, patches = _Inner(plan, anchor), Patches()

        def install(module: nn.Module) -> nn.Module:
            patches.replace(module, lambda f: inner.root(module, f))
            for stage in plan.down:
                patches.replace(stage.module, lambda f, stage=stage: inner.down(stage, f))
            for mid in plan.mid:
                patches.replace(mid, lambda f, mid=mid: inner.mid(mid, f))
            for i, stage in enumerate(plan.up):
                patches.replace(stage.module, lambda f, i=i, stage=stage: inner.up(stage, i == plan.border, f))
            return module

        def undo() -> None:
            patches.undo()
            inner.outputs.clear()
            inner.now = None

        def report() -> WrapReport:
            did = inner.outputs.reused
            facts = inner.outputs.facts()
            facts["skipped_share"] *= 1 - plan.outer / plan.layers
            facts["with_residuals"] = inner.foreign
            reason = "every network call had additional residuals (ControlNet, adapter)" if inner.foreign else ""
            reason = reason or f"no step lay between two that are computed: interval = {self.interval}"
            return WrapReport(did, UNIT, facts, "" if did else reason)

        return Wrap(report=report, network=install, undo=undo, held=lambda: inner.outputs.held)
