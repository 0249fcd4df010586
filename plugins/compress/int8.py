"""int8: linear layers whose weights stay int8 in memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.host.suggest import nearest
from suite.plugin import Plugin
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from suite.fitting.calibration import Calibration
    from suite.kernels.int8_linear import Int8Linear
    from suite.network import Network
    from suite.run import Run

#: Layers that see one row a sample and steer all blocks, and the last one: little to save, much to lose.
SKIP = ("*embed*", "*time_emb*", "adaln_single*", "proj_out*", "lm_head")


@dataclass
class _Tally:
    """What was replaced; layers are asked for their path when the report is made."""

    layers: list[Int8Linear] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    before: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def report(self) -> WrapReport:
        if not self.layers:
            why = ", ".join(f"{n} {reason}" for reason, n in self.skipped.items())
            reason = f"no linear layer was replaced: {why}" if why else "the network has no linear layers"
            return WrapReport(0, "linear layers replaced", {"skipped": dict(self.skipped)}, reason)
        after = sum(layer.nbytes() for layer in self.layers)
        paths: dict[str, Counter[str]] = {}
        for layer in self.layers:
            shape = f"{layer.in_features}x{layer.out_features}"
            paths.setdefault(shape, Counter())[layer.path or "not called"] += 1
        facts = {
            "bytes_before": self.before,
            "bytes_after": after,
            "ratio": round(after / self.before, 4),
            "paths": {shape: dict(count) for shape, count in paths.items()},
            "fallbacks": dict(Counter(layer.reason for layer in self.layers if layer.reason)),
            "error_mean": sum(self.errors) / len(self.errors),
            "error_max": max(self.errors),
            "skipped": dict(self.skipped),
        }
        return WrapReport(len(self.layers), "linear layers replaced", facts)


@dataclass(frozen=True)
class Int8(Plugin):
    """Symmetric int8 weights with one scale an output channel (W8A16), on CPUs also activations (W8A8).

    Activations are quantised with one scale a row, found while running: no calibration, and no sample
    depends on its batch. The module is changed in place and the old weights are let go, so there is no
    undo: keeping them would give back the memory that was saved.

    Args:
        compute: how to multiply. `auto`: int8 products on a CPU that has them (`int_mm` or `onednn`,
            whichever was faster when first called; they agree bit for bit), else `bf16`, or `fp32` for a
            float32 network. `bf16` and `fp32` dequantise the weights of one layer at a time.
        min_features: least number of inputs and of outputs of a layer that is replaced.
        skip: globs of layer names that are left alone; yours replace the default ones.
    """

    compute: Literal["auto", "int_mm", "onednn", "bf16", "fp32"] = "auto"
    min_features: int = 64
    skip: tuple[str, ...] = SKIP

    summary = "int8 weights for linear layers, and int8 products where the CPU has them"
    paper = "LLM.int8() (2208.07339), section 2.1; per-row activations as in ZeroQuant (2206.01861)"
    effects = frozenset({"weights", "low-bit"})
    #: A difference of one rounding error can move an activation by one of its 127 levels.
    batch_tolerance = 0.02

    def __post_init__(self) -> None:
        if self.min_features < 1:
            raise ConfigError(f"int8: min_features = {self.min_features}: expected a whole number from 1")

    @hookimpl
    def compress(self, network: Network, calibration: Calibration, run: Run) -> Wrap:
        del calibration, run
        self._check_skip(network.module)
        tally = _Tally()

        def replace(module: nn.Module) -> nn.Module:
            _replace(module, self, tally)
            return module

        return Wrap(report=tally.report, network=replace)

    def _check_skip(self, module: nn.Module) -> None:
        names = [name for name, _ in _linears(module)]
        for glob in self.skip:
            if names and glob not in SKIP and not any(fnmatchcase(name, glob) for name in names):
                hint = nearest(glob, names) or f"; linear layers: {', '.join(names[:3])}, ..."
                raise ConfigError(f"int8: skip = {glob!r} matches no linear layer{hint}")


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers by every path that leads to them."""
    from torch import nn

    for name, part in module.named_modules(remove_duplicate=False):
        if name and isinstance(part, nn.Linear):
            yield name, part


def _replace(module: nn.Module, options: Int8, tally: _Tally) -> None:
    from suite.kernels.int8_linear import Int8Linear

    owners = _owners(module)
    done: dict[int, Int8Linear] = {}
    for name, part in list(_linears(module)):
        if id(part) not in done:
            if reason := _why_not(name, part, options, owners):
                tally.skipped[reason] += 1
                continue
            try:
                layer = Int8Linear(part, options.compute)
            except ValueError as error:
                raise ConfigError(
                    f"int8: layer {name}: {error}; leave it out with --compress int8:skip={name}"
                ) from None
            done[id(part)] = layer
            tally.layers.append(layer)
            tally.errors.append(_error(part, layer))
            tally.before += sum(p.numel() * p.element_size() for p in part.parameters())
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, done[id(part)])


def _why_not(name: str, part: nn.Linear, options: Int8, owners: Counter[int]) -> str:
    """Why a layer is left alone; empty if it is replaced."""
    from torch import nn

    if any(fnmatchcase(name, glob) for glob in options.skip):
        return "named in skip"
    if min(part.in_features, part.out_features) < options.min_features:
        return f"smaller than min_features = {options.min_features}"
    # Subclasses have a meaning of their own; torch's attention reads its output layer's weight directly.
    if type(part) is not nn.Linear:
        return f"of the class {type(part).__name__}"
    if owners[id(part.weight)] > 1:
        return "share their weight with another layer"
    if "forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks:
        return "have a hook or a patched forward"
    return ""


def _owners(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter itself."""
    return Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


def _error(source: nn.Linear, layer: Int8Linear) -> float:
    """Relative Frobenius error of the weights; 0 for weights that are all zero."""
    exact = source.weight.detach().float()
    norm = float(exact.norm())
    back = layer.plain_weight().float() * layer.scale[:, None]
    return float((back - exact).norm()) / norm if norm else 0.0
