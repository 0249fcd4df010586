"""Blocks that run one after the other: finding them, and their arguments, states and rows."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.network.described import found

if TYPE_CHECKING:
    from torch import Tensor, nn

    from suite.network import BlockRef, Network

    #: What a block carries, in the order in which it returns it; None is a stream that a block ends.
    States = tuple[Any, ...]

OTHERWISE = "use --cache fora, which reuses parts of blocks, or drop the cache"
#: Arguments that hold a table of positions, [tokens, d]: its first axis may be as long as the batch by chance.
TABLES = ("rotary", "rope", "freqs", "pos")


def chain_of(network: Network, who: str) -> tuple[BlockRef, ...]:
    """The blocks that run one after the other in the network itself, several lists joined.

    Args:
        network: where to look.
        who: the plugin that asks, for its error messages.

    Raises:
        ConfigError: they are nested in the stages of a U-Net, fewer than two, or do not carry the same states.
    """
    if network.blocks("down", "mid", "up"):
        raise ConfigError(
            f"{who} looked for one chain of blocks, but {found(network)}: the blocks are nested in the stages "
            f"of a U-Net, whose skip connections need every stage; {OTHERWISE}"
        )
    blocks = network.blocks("block")
    # A list deeper down belongs to another sub-network, a refiner of the text for instance.
    holders = [ref.name.split(".")[:-2] for ref in blocks]
    outermost = min(holders, key=len, default=[])
    chain = tuple(ref for ref, holder in zip(blocks, holders, strict=True) if holder == outermost)
    if len(chain) < 2:
        raise ConfigError(f"{who} looked for a chain of at least 2 blocks, but {found(network)}; {OTHERWISE}")
    if odd := next((ref for ref in chain if ref.hidden != chain[0].hidden), None):
        raise ConfigError(
            f"{who}: {chain[0].name} carries {', '.join(chain[0].hidden)}, but {odd.name} carries "
            f"{', '.join(odd.hidden)}, so they are not one chain; {OTHERWISE}"
        )
    return chain


def in_turns(refs: Sequence[BlockRef]) -> bool:
    """Whether blocks of two lists take turns, as those over space and over time do, each with its own rows."""
    lists = [ref.name.rpartition(".")[0] for ref in refs]
    return len({a for a, b in itertools.pairwise(lists) if a != b}) > 1  # back again, not from one list to the next


def closed(refs: Sequence[BlockRef]) -> Sequence[BlockRef]:
    """The longest beginning of these blocks that ends in the shape in which it begins.

    Where blocks over space and over time take turns it is an odd number: the last one of an even chain is left out.
    """
    return refs[: len(refs) - 1] if in_turns(refs) and len(refs) % 2 == 0 else refs


def by_sample(state: Tensor | None, samples: int) -> Tensor | None:
    """`state` with one row a sample: the rows of a sample, which lie together, become an axis if there are several."""
    return state if state is None or state.shape[0] == samples else state.unflatten(0, (samples, -1))


def argument_names(module: nn.Module) -> list[str]:
    """Arguments of a module's forward, without self."""
    # Of the class: the instance's forward may be another wrap's.
    return list(inspect.signature(type(module).forward).parameters)[1:]


def argument(name: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument called `name` of a call with these arguments."""
    return kwargs[name] if name in kwargs else args[names.index(name)]


def padded(names: Sequence[str], args: Sequence[Any]) -> list[str]:
    """A name for every positional argument, also for those that a forward takes as *args."""
    return [*names, *[""] * len(args)][: len(args)]


def states_of(who: str, ref: BlockRef, output: Any) -> States:
    """The block's output as a tuple of states.

    Raises:
        ConfigError: it does not return what it carries.
    """
    states = output if isinstance(output, tuple | list) else (output,)
    if len(states) != len(ref.hidden):
        raise ConfigError(
            f"{who}: {ref.name} returned {len(states)} values, expected {', '.join(ref.hidden)}; {OTHERWISE}"
        )
    return tuple(states)


def difference(who: str, refs: Sequence[BlockRef], first: Tensor | None, last: Tensor | None) -> Tensor | None:
    """`last` - `first`, or None if one of the streams has ended.

    Raises:
        ConfigError: they have not one shape.
    """
    if first is None or last is None:
        return None
    if first.shape != last.shape:
        raise ConfigError(
            f"{who}: {refs[0].name} is given {tuple(first.shape)} and {refs[-1].name} gives {tuple(last.shape)}, so "
            f"their difference is not a residual; {OTHERWISE}"
        )
    return last - first


def row_means(x: Tensor) -> Tensor:
    """Mean absolute value of each row, [B], in float32."""
    return x.abs().float().mean(tuple(range(1, x.ndim)))


def take(value: Any, name: str, rows: Any, batch: int) -> Any:
    """Rows of everything in an argument whose first axis is the batch."""
    if isinstance(value, dict):
        return {key: take(v, key, rows, batch) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(take(v, name, rows, batch) for v in value)
    shape = getattr(value, "shape", ())
    table = len(shape) <= 2 and any(word in name for word in TABLES)
    return value[rows] if len(shape) > 0 and shape[0] == batch and not table else value


def put(state: Any, rows: Any, new: Any) -> Any:
    """`state` with these rows replaced, as a new tensor."""
    return None if state is None or new is None else state.index_copy(0, rows, new)


def as_output(states: Sequence[Any]) -> Any:
    """States as a block returns them: one alone, several as a tuple."""
    return states[0] if len(states) == 1 else tuple(states)
