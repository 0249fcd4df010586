"""One plugin manager an engine: registers what the recipe names, calls the hooks, says whose fault it was.

This is the only module that sees pluggy's calls; the rest of the suite uses its five typed methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from suite import hookspecs
from suite.errors import ConfigError, PluginError, SuiteError, out_of_memory
from suite.host.discovery import Entry, find
from suite.plugin import Plugin, build
from suite.recipe import Recipe
from suite.rules import BOOK, Finding, Member, Rule, enforce

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.schedule import Schedule
    from suite.diffusion.solver import Solver
    from suite.fitting.calibration import Calibration
    from suite.mesh import Mesh
    from suite.network import Network
    from suite.network.experts import Companions
    from suite.run import Run
    from suite.wrap import Wrap


@dataclass(frozen=True)
class Active:
    """A plugin in force: its instance, where it came from, and the hook for which the recipe named it."""

    entry: Entry
    plugin: Any
    hook: str
    text: str

    @property
    def member(self) -> Member:
        """This plugin as the rules see it."""
        return Member(self.text, self.hook, frozenset(self.plugin.effects))


def load(recipe: Recipe, entries: Mapping[str, Entry], modality: str) -> list[Active]:
    """Import and build the plugins that a recipe names, in the host's order.

    Raises:
        ConfigError: unknown name or option, hook not implemented, modality not supported.
        PluginError: the plugin cannot be imported, or is not a plugin.
    """
    out: list[Active] = []
    for hook, named in recipe.named():
        entry = find(named.name, entries)
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Plugin)):
            raise PluginError(f"plugin {entry.origin}: {entry.target} is not a subclass of suite.plugin.Plugin")
        implemented = implemented_hooks(cls)
        if hook not in implemented:
            offer = f"; use --{implemented[0]} {named.name}" if implemented else ""
            raise ConfigError(f"plugin {entry.origin} does not implement the hook {hook!r}{offer}")
        if cls.modalities is not None and modality not in cls.modalities:
            works = ", ".join(sorted(cls.modalities))
            raise ConfigError(f"plugin {entry.origin} does not support the modality {modality!r}; it supports {works}")
        if any(a.entry.name == entry.name and a.hook == hook for a in out):
            raise ConfigError(f"plugin {entry.origin} is named twice for the hook {hook!r}; name it once")
        out.append(Active(entry, build(cls, named.options, name=named.name), hook, str(named)))
    return out


def implemented_hooks(cls: type) -> list[str]:
    """The hooks for which a plugin class has a marked method."""
    marked = [n for n in dir(cls) if getattr(getattr(cls, n, None), f"{hookspecs.PROJECT}_impl", None) is not None]
    return [h for h in hookspecs.HOOKS if h in marked]


class Manager:
    """The five hooks of one engine."""

    def __init__(self, active: Iterable[Active]) -> None:
        self.active = list(active)
        self._pm = pluggy.PluginManager(hookspecs.PROJECT)
        self._pm.add_hookspecs(hookspecs)
        for a in self.active:
            if not self._pm.is_registered(a.plugin):
                self._register(a)
        self._check_single()

    def _register(self, a: Active) -> None:
        try:
            self._pm.register(a.plugin, name=f"{a.hook}:{a.entry.name}")
            self._pm.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {a.entry.origin} does not fit the hooks: {error}") from error

    def _check_single(self) -> None:
        for hook in hookspecs.SINGLE:
            # By name: one plugin may bring both, and be named for both.
            named = {a.entry.name: a for a in self.active if hook in implemented_hooks(type(a.plugin))}
            if len(named) > 1:
                both = " and ".join(a.entry.origin for a in named.values())
                raise ConfigError(f"two plugins for the hook {hook!r}: {both}; name only one of them")

    def enforce_rules(self, run_words: Iterable[str]) -> list[Finding]:
        """Check the chain against the rule book and the plugins' own rules; returns the warnings.

        Args:
            run_words: words of the run itself, e.g. `guided`, `few-step`, `guidance-distilled`.

        Raises:
            RuleError: a rule forbids the chain.
        """
        own: list[Rule] = [r for a in self.active for r in a.plugin.rules]
        chain = [a.member for a in self.active]
        chain += [Member(f"this run ({word})", "run", frozenset({word})) for word in run_words]
        return enforce(chain, [*BOOK, *own])

    def of(self, hook: str) -> list[Active]:
        """Active plugins of a hook, in the order of the recipe."""
        return [a for a in self.active if a.hook == hook]

    def _call(self, a: Active, **arguments: Any) -> Any:
        """One plugin's answer to its hook, through pluggy, with attribution."""
        # By equality, as pluggy registers: one plugin named for two hooks is registered once.
        others = [p for p in self._pm.get_plugins() if p != a.plugin]
        hook = self._pm.subset_hook_caller(a.hook, others)
        try:
            result = hook(**arguments)
        except SuiteError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise PluginError(
                f"plugin {a.entry.origin} failed in the hook {a.hook!r}: {type(error).__name__}: {error}"
            ) from error
        if a.hook in hookspecs.SINGLE:
            return result
        return result[0] if result else None

    def schedule(self, noise: NoiseSchedule, run: Run) -> Schedule:
        """The active schedule's answer."""
        from suite.diffusion.schedule import Schedule

        return self._one("schedule", Schedule, noise, run)

    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        """The active solver's answer."""
        from suite.diffusion.solver import Solver

        return self._one("solver", Solver, noise, run)

    def _one(self, hook: str, kind: type, noise: NoiseSchedule, run: Run) -> Any:
        named = self.of(hook)
        if not named:
            raise ConfigError(f"no {hook} is named; add --{hook} NAME (see `suite plugins list`)")
        result = self._call(named[0], noise=noise, run=run)
        if not isinstance(result, kind):
            raise PluginError(
                f"plugin {named[0].entry.origin}, hook {hook!r}: "
                f"expected a {kind.__name__}, got {type(result).__name__}"
            )
        return result

    def compress(
        self, network: Network, calibration: Calibration, run: Run, companions: Companions, a: Active
    ) -> Wrap | None:
        """One compressor's wrap."""
        return self._wrap(a, network=network, calibration=calibration, run=run, companions=companions)

    def parallelize(self, network: Network, mesh: Mesh, run: Run, a: Active) -> Wrap | None:
        """One parallelizer's wrap."""
        return self._wrap(a, network=network, mesh=mesh, run=run)

    def cache(self, network: Network, run: Run, a: Active, noise: NoiseSchedule | None = None) -> Wrap | None:
        """One cache's wrap, made for one run; the engine always gives the noise schedule."""
        return self._wrap(a, network=network, noise=noise, run=run)

    def _wrap(self, a: Active, **arguments: Any) -> Wrap | None:
        from suite.wrap import Wrap

        result = self._call(a, **arguments)
        if result is not None and not isinstance(result, Wrap):
            raise PluginError(
                f"plugin {a.entry.origin}, hook {a.hook!r}: expected a Wrap or None, got {type(result).__name__}"
            )
        return result


#: Host modules that call on from a plugin to the next in line; the rest of the host are tools that plugins use.
_PASS_ON = (
    "suite.diffusion.denoiser",
    "suite.network.experts",
    "suite.diffusion.guidance",
    "suite.diffusion.sampler",
    "suite.engine.engine",
)


def blame(error: BaseException, active: Iterable[Active]) -> Active | None:
    """The plugin whose code is innermost on the error's traceback, unless it had handed on to the host's.

    What a plugin's own helpers and the host's tools raise is the plugin's; what the denoiser or the modality
    raises below it is not.
    """
    by_module = {type(a.plugin).__module__: a for a in active}
    culprit: Active | None = None
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module in by_module:
            culprit = by_module[module]
        elif module in _PASS_ON or module.startswith("suite.modalities."):
            culprit = None
        trace = trace.tb_next
    return culprit
