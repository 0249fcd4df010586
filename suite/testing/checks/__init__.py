"""The conformance kit: small named checks of what the hooks promise, made for any plugin.

A check raises AssertionError whose message begins with the plugin's and the check's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import pytest

from suite.errors import ConfigError
from suite.host.manager import implemented_hooks
from suite.plugin import Plugin, build
from suite.testing.checks import cache, every, parallelize, schedule, solver, wrap  # they register
from suite.testing.checks.subject import BY_HOOK, COMMON, CONTINUOUS, DISCRETE, ENDS, WRAP, Check, Subject

WRAPS = ("compress", "parallelize", "cache")


def checks_for(plugin: type | Plugin, name: str | None = None) -> Iterator[Check]:
    """The checks that apply to a plugin, by the hooks it implements.

    Args:
        plugin: its class, which is built with its `acting_options`, or an instance with options of your choice.
        name: what to call it; the class's name if None.
    """
    name = name or (plugin.__name__ if isinstance(plugin, type) else type(plugin).__name__)
    subject = Subject(name, _built(plugin, name) if isinstance(plugin, type) else plugin)

    def check(function: Callable[..., None], *arguments: Any) -> Check:
        title = "_".join([function.__name__.removeprefix("check_"), *arguments])
        return Check(subject.name, title, lambda: function(subject, *arguments))

    for function in COMMON:
        yield check(function)
    hooks = implemented_hooks(subject.cls)
    for hook in hooks:
        for function in BY_HOOK.get(hook, ()):
            yield check(function)
    wraps = [h for h in hooks if h in WRAPS]
    for hook in wraps:
        for wrap_function in WRAP:
            # The hook is part of the name only where one plugin implements several.
            if len(wraps) > 1:
                yield check(wrap_function, hook)
            else:
                title = wrap_function.__name__.removeprefix("check_")
                yield Check(subject.name, title, lambda f=wrap_function, h=hook: f(subject, h))


def _built(cls: type, name: str) -> Any:
    """An instance with the options with which it acts, by default the defaults."""
    return build(cls, getattr(cls, "acting_options", {}), name=name)


def parametrize_with_checks(
    plugins: Iterable[type | Plugin] | Mapping[str, type | Plugin],
    expected_failed_checks: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """A decorator that runs a test once for each check of each plugin, in the argument `check`.

    Args:
        plugins: classes or instances, or a mapping from names to them.
        expected_failed_checks: name of a check, or `plugin-check`, -> why it fails. Such a check must fail.
    """
    expected = dict(expected_failed_checks or {})
    named: list[tuple[str | None, type | Plugin]] = []
    if isinstance(plugins, Mapping):
        named.extend(cast("Mapping[str, type | Plugin]", plugins).items())
    else:
        named.extend((None, p) for p in cast("Iterable[type | Plugin]", plugins))
    parameters, known = [], set()
    for name, plugin in named:
        for check in checks_for(plugin, name):
            known |= {check.name, check.id}
            reason = expected.get(check.id) or expected.get(check.name)
            marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
            parameters.append(pytest.param(check, id=check.id, marks=marks))
    if unknown := sorted(expected.keys() - known):
        raise ConfigError(
            f"expected_failed_checks: there is no check {unknown[0]!r}; checks: {', '.join(sorted(known))}"
        )
    return pytest.mark.parametrize("check", parameters)


__all__ = [
    "CONTINUOUS", "DISCRETE", "ENDS", "Check", "Subject", "cache", "checks_for", "every", "parallelize",
    "parametrize_with_checks", "schedule", "solver", "wrap",
]  # fmt: skip
