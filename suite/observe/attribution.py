"""Whose fault it is: errors of plugins get their name, and what a plugin leaves behind is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from suite.errors import PluginError, SuiteError, out_of_memory
from suite.host.manager import Active, blame
from suite.network import Network
from suite.wrap import Wrap

#: A wrap and whose it is; None is the host's own.
Link = tuple[Active | None, Wrap | None]


@contextmanager
def attributed(active: Active | None, hook: str, chain: Sequence[Active]) -> Iterator[None]:
    """Turn an error that a plugin caused into a PluginError that names it."""
    try:
        yield
    except SuiteError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
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


@contextmanager
def undone(module: nn.Module, chain: Sequence[Link], actives: Sequence[Active]) -> Iterator[None]:
    """Undo the wraps that `chain` holds at the end, newest first; after that every forward is what it was before.

    Also after an error or Ctrl-C, in a hook or in the middle of a run: the next run finds the network as the first did.

    Raises:
        PluginError: an undo failed, or left a forward behind; the others are undone, and the network is put back.
    """
    before = _forwards(module)
    try:
        yield
    except BaseException as error:
        failed = undo_all(chain, actives)
        _put_back(before, module)
        if isinstance(error, Exception) and failed and not isinstance(failed, Exception):
            raise failed from error  # a Ctrl-C says more than what it came upon
        raise
    failed = undo_all(chain, actives)
    changed = _put_back(before, module)
    if failed:
        raise failed
    if changed:
        names = ", ".join(active.entry.origin for active, _ in chain if active)
        raise PluginError(f"after the run {changed[0] or 'the network'} was not put back; active caches: {names}")


def undo_all(chain: Sequence[Link], actives: Sequence[Active]) -> BaseException | None:
    """Undo every wrap, newest first, whatever the others do and through a Ctrl-C; the first failure, if any."""
    failed: BaseException | None = None
    for active, wrap in reversed(chain):
        if not (wrap and wrap.undo):
            continue
        try:
            with attributed(active, "undo", actives):
                wrap.undo()
        except BaseException as error:  # raised by the caller, when all are undone
            failed = failed or error
    return failed


def _forwards(module: nn.Module) -> dict[nn.Module, Any]:
    """The modules with a replaced forward, and what replaced it."""
    return {m: m.__dict__["forward"] for m in module.modules() if "forward" in m.__dict__}


def _put_back(before: Mapping[nn.Module, Any], module: nn.Module) -> list[str]:
    """Make every forward what it was; the names of those that were not."""
    changed = []
    for name, part in module.named_modules():
        if part.__dict__.get("forward") is not before.get(part):
            changed.append(name)
            part.__dict__.pop("forward", None)
            if part in before:
                part.__dict__["forward"] = before[part]
    return changed
