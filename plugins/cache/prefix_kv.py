"""Prefix KV: text that is filled block by block, with keys and values kept of what lies before the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.host.discovery import find, installed
from suite.plugin import Plugin, build, options_of
from suite.wrap import Wrap

if TYPE_CHECKING:
    from torch import nn

    from suite.host.models import ModelFolder
    from suite.network import Network
    from suite.recipe import Named, Recipe
    from suite.run import Run


@dataclass(frozen=True)
class PrefixKV(Plugin):
    """Wu 2025, section 3.2: between two blocks, only the block and what follows it are computed.

    The first evaluation of a block is whole. Until another place has changed, the next ones compute the places from
    the block on, and attend to the keys and values that the prompt and the text before had then. At block ends, and
    at every evaluation with refresh = 1, it is the plain answer. In between it is an approximation: with attention in
    both directions the text before sees the block too, so its keys would have moved as the block was filled. In a
    network of one layer, where keys depend on their own token alone, it is exact.

    Args:
        block: places of a block; the solver's own.
        refresh: evaluate a row whole at every so many evaluations (dLLM-Cache's interval); 0 at block ends only.
        limit_mib: most memory that may be held.

    Raises:
        ConfigError: the solver does not fill blocks of this size, or the network cannot be asked for parts.
    """

    block: int = 8
    refresh: int = 0
    limit_mib: float = 1024.0

    summary = "masked tokens in blocks: keep keys and values of what lies before the block"
    paper = "Fast-dLLM (2505.22618), section 3.2; refresh as in dLLM-Cache (2506.06295), section 3.2"
    effects = frozenset({"needs-tokens", "token-states", "dynamic-decision"})
    bench_options = ({"refresh": 2}, {"refresh": 4}, {})
    noop_options: ClassVar[dict[str, Any]] = {"refresh": 1}
    acting_options: ClassVar[dict[str, Any]] = {"block": 4}
    suffix: ClassVar[bool] = False
    called: ClassVar[str] = "prefix-kv"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"{self.called}: block = {self.block}: expected at least 1 place")
        if self.refresh < 0:
            raise ConfigError(
                f"{self.called}: refresh = {self.refresh}: expected evaluations, or 0 for block ends only"
            )
        if not self.limit_mib > 0:
            raise ConfigError(f"{self.called}: limit_mib = {self.limit_mib}: expected MiB above 0")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.refresh == 1

    def check(self, recipe: Recipe, folder: ModelFolder) -> None:
        """The solver must fill blocks of the same size: what is kept between two whole evaluations is a block."""
        if not folder.tokens or recipe.solver is None:
            return
        theirs = _block_of(recipe.solver)
        if theirs != self.block:
            has = "fills places anywhere" if not theirs else f"has block = {theirs}"
            raise ConfigError(
                f"{self.called}: block = {self.block}, but the solver {recipe.solver.name} {has}; give both the same, "
                f"e.g. --solver threshold:block={self.block} --cache {self.called}:block={self.block}"
            )

    @hookimpl
    def cache(self, network: Network, run: Run) -> Wrap:
        del run
        from suite.network.patch import Patches
        from suite.plugins.cache._token_kv import KeptTokens, TokenKV, attentions

        parts = attentions(self.called, network)
        state = TokenKV(self.called, self.block, self.suffix, self.refresh, self.limit_mib)
        patches = Patches()
        if self.refresh == 1:
            return Wrap(report=state.report)

        def install(module: nn.Module) -> nn.Module:
            for part in parts:
                patches.replace(part.module, state.attention(part.name))
            return module

        def undo() -> None:
            patches.undo()
            state.kept.clear()

        return Wrap(
            report=state.report,
            network=install,
            denoiser=lambda inner: KeptTokens(inner, state),
            undo=undo,
            held=state.held,
        )


def _block_of(solver: Named) -> int:
    """The places of a block that a solver fills before the next; 0 if it knows no blocks."""
    cls = find(solver.name, installed()).load()
    if "block" not in options_of(cls):
        return 0
    return int(build(cls, solver.options, name=solver.name).block)
