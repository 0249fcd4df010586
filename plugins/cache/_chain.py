"""Networks whose blocks run one after the other, and how the forwards of such blocks are spoken to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.plugins.cache._shared import found

if TYPE_CHECKING:
    from torch import nn

    from suite.network import BlockRef, Network

OTHERWISE = "use --cache fora, which reuses parts of blocks, or drop the cache"


def chain_of(network: Network, plugin: str) -> tuple[BlockRef, ...]:
    """The blocks that run one after the other in the network itself, several lists joined.

    Raises:
        ConfigError: in the name of `plugin`: they are nested in the stages of a U-Net, fewer than two, or do not
            carry the same states.
    """
    if network.blocks("down", "mid", "up"):
        raise ConfigError(
            f"{plugin} looked for one chain of blocks, but {found(network)}: the blocks are nested in the stages "
            f"of a U-Net, whose skip connections need every stage; {OTHERWISE}"
        )
    blocks = network.blocks("block")
    # A list deeper down belongs to another sub-network, a refiner of the text for instance.
    holders = [ref.name.split(".")[:-2] for ref in blocks]
    outermost = min(holders, key=len, default=[])
    chain = tuple(ref for ref, holder in zip(blocks, holders, strict=True) if holder == outermost)
    if len(chain) < 2:
        raise ConfigError(f"{plugin} looked for a chain of at least 2 blocks, but {found(network)}; {OTHERWISE}")
    if odd := next((ref for ref in chain if ref.hidden != chain[0].hidden), None):
        raise ConfigError(
            f"{plugin}: {chain[0].name} carries {', '.join(chain[0].hidden)}, but {odd.name} carries "
            f"{', '.join(odd.hidden)}, so they are not one chain; {OTHERWISE}"
        )
    return chain


def argument_names(module: nn.Module) -> list[str]:
    """Names of a forward's arguments, without self. Of the class: the instance's forward may be another wrap's."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def argument(name: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of this name, however it was passed."""
    return kwargs[name] if name in kwargs else args[names.index(name)]


def states_of(plugin: str, ref: BlockRef, output: Any) -> Any:
    """The block's output as a tuple of states.

    Raises:
        ConfigError: in the name of `plugin`: it does not return what it carries.
    """
    states = output if isinstance(output, tuple | list) else (output,)
    if len(states) != len(ref.hidden):
        raise ConfigError(
            f"{plugin}: {ref.name} returned {len(states)} values, expected {', '.join(ref.hidden)}; {OTHERWISE}"
        )
    return tuple(states)


def as_output(states: Sequence[Any]) -> Any:
    """States as a block returns them: one alone, several as a tuple."""
    return states[0] if len(states) == 1 else tuple(states)
