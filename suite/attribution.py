"""Whose fault it is: errors of plugins get their name, and what a plugin leaves behind is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from suite.errors import PluginError, SuiteError
from suite.manager import Active, blame
from suite.network import Network
from suite.wrap import Wrap


@contextmanager
def attributed(active: Active | None, hook: str, chain: Sequence[Active]) -> Iterator[None]:
    """Turn an error that a plugin caused into a PluginError that names it."""
    try:
        yield
    except SuiteError:
        raise
    except Exception as error:
        culprit = active or blame(error, chain)
        if culprit is None:
            raise
        raise PluginError(
            f"plugin {culprit.entry.origin} failed in the hook {hook or culprit.hook!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def applied(active: Active, wrap: Wrap, network: Network) -> Network:
    """The network with a plugin's wrap around its module.

    Raises:
        PluginError: what came back is no module.
    """
    assert wrap.network is not None
    module = wrap.network(network.module)
    if not isinstance(module, nn.Module):
        raise PluginError(
            f"plugin {active.entry.origin}: its network wrap returned {type(module).__name__}, expected nn.Module"
        )
    return replace(network, module=module)


def forwards(module: nn.Module) -> dict[str, int]:
    """Which modules have a replaced forward, and by what."""
    return {n: id(m.__dict__["forward"]) for n, m in module.named_modules() if "forward" in m.__dict__}


def check_restored(before: Mapping[str, int], module: nn.Module, caches: Sequence[Active]) -> None:
    """Raises PluginError when a run has left a forward behind that was not there `before`, or taken one away."""
    after = forwards(module)
    if before != after:
        changed = sorted(set(before.items()) ^ set(after.items()))[0][0]
        names = ", ".join(a.entry.origin for a in caches)
        raise PluginError(f"after the run {changed or 'the network'} was not put back; active caches: {names}")
