"""The manager: whose fault it is, and what two plugins may not do at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from suite.diffusion.noise import Flow
from suite.diffusion.schedule import Schedule
from suite.diffusion.solver import Solver
from suite.errors import ConfigError, PluginError, RuleError
from suite.host.discovery import installed
from suite.host.manager import Active, Manager, implemented_hooks, load
from suite.observe.attribution import attributed
from suite.recipe import Named, Recipe, from_options
from suite.testing import Tiny
from suite.testing.oracles import a_run

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
Load = Callable[..., list[Active]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Install fixture distributions for one test, and load what a recipe names."""

    def install(*distributions: str, modality: str = "image", **named: str | list[str]) -> list[Active]:
        for name in distributions:
            monkeypatch.syspath_prepend(FIXTURES / name)
        return load(from_options(**named), installed(), modality)  # pyright: ignore[reportArgumentType]

    return install


def test_named_plugins_are_built_in_the_hosts_order(loaded: Load) -> None:
    active = loaded("success", cache=["good-cache:note=b"], solver="good-solver")
    assert [(a.hook, a.text) for a in active] == [("solver", "good-solver"), ("cache", "good-cache:note=b")]
    assert active[1].plugin.note == "b"
    assert active[0].entry.origin == "good-solver (fixture-success 1.0)"


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ({"solver": "good-solvr"}, ConfigError, "unknown plugin 'good-solvr'; did you mean good-solver"),
        ({"cache": ["good-solver"]}, ConfigError, "does not implement the hook 'cache'; use --solver good-solver"),
        ({"cache": ["good-cache:nota=1"]}, ConfigError, "unknown option 'nota'; did you mean note"),
        ({"cache": ["good-cache", "good-cache:note=b"]}, ConfigError, "is named twice for the hook 'cache'"),
        (
            {"cache": ["good-cache"], "modality": "text"},
            ConfigError,
            r"\(fixture-success 1.0\) does not support .*text.*supports image",
        ),
        ({"cache": ["not-a-plugin"]}, PluginError, r"not-a-plugin \(fixture-success 1.0\).*is not a subclass"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(loaded: Load, named: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        loaded("success", **named)


def test_two_solvers_conflict_and_both_are_named(loaded: Load) -> None:
    active = loaded("success", schedule="both", solver="good-solver")
    with pytest.raises(ConfigError) as raised:
        Manager(active)
    assert "two plugins for the hook 'solver'" in str(raised.value)
    assert "both (fixture-success 1.0) and good-solver (fixture-success 1.0)" in str(raised.value)


def test_two_solvers_of_two_distributions(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    active = loaded("success", solver="good-solver")
    monkeypatch.setenv("SUITE_NO_PLUGINS", "good-solver")
    active += loaded("duplicate", solver="other-solver")
    with pytest.raises(
        ConfigError, match=r"good-solver \(fixture-success 1.0\) and other-solver \(fixture-duplicate 2.5\)"
    ):
        Manager(active)


def test_one_plugin_may_bring_both(loaded: Load) -> None:
    manager = Manager(loaded("success", schedule="both", solver="both"))
    run = a_run(steps=4)
    assert isinstance(manager.schedule(Flow(), run), Schedule)
    assert isinstance(manager.solver(Flow(), run), Solver)


def test_a_misspelt_hook_is_an_error(loaded: Load) -> None:
    with pytest.raises(PluginError, match=r"misspelt \(fixture-success 1.0\) does not fit the hooks.*compres"):
        Manager(loaded("success", cache=["misspelt"]))


def test_an_unknown_argument_is_an_error(loaded: Load) -> None:
    with pytest.raises(PluginError, match=r"extra-argument \(fixture-success 1.0\) does not fit.*(?s:.)*model"):
        Manager(loaded("success", cache=["extra-argument"]))


def test_wrong_return_types(loaded: Load) -> None:
    manager = Manager(loaded("success", solver="wrong-type", cache=["wrong-type"]))
    with pytest.raises(
        PluginError, match=r"wrong-type \(fixture-success 1.0\), hook 'solver': expected a Solver, got str"
    ):
        manager.solver(Flow(), a_run())
    tiny = Tiny(torch.nn.Identity())
    with pytest.raises(PluginError, match=r"hook 'cache': expected a Wrap or None, got function"):
        tiny.wrap(manager, "cache")


def test_no_solver_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match="no solver is named; add --solver NAME"):
        Manager([]).solver(Flow(), a_run())


def test_an_exception_in_the_hook_is_attributed(loaded: Load) -> None:
    manager = Manager(loaded("raises", cache=["raises-hook"]))
    with pytest.raises(PluginError) as raised:
        Tiny(torch.nn.Identity()).wrap(manager, "cache")
    assert str(raised.value) == (
        "plugin raises-hook (fixture-raises 1.0) failed in the hook 'cache': RuntimeError: no such block"
    )
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("where", "cause"), [("before", KeyError), ("helper", ValueError), ("tool", AttributeError), ("nowhere", None)]
)
def test_an_exception_when_called_is_attributed(loaded: Load, where: str, cause: type[Exception] | None) -> None:
    active = loaded("raises", "success", solver="good-solver", cache=["good-cache", f"raises-call:where={where}"])
    manager = Manager(active)
    # Without a network to call, what lies below the plugin fails; that is not the plugin's fault.
    tiny = Tiny(torch.nn.Identity())
    wrap = manager.cache(tiny.network, a_run(), active[2])
    expected = PluginError if cause else TypeError
    with pytest.raises(expected) as raised, attributed(None, "", manager.active):
        tiny.generate((0,), wrap)
    if cause:
        assert "plugin raises-call (fixture-raises 1.0) failed in the hook 'cache'" in str(raised.value)
        assert isinstance(raised.value.__cause__, cause)


def test_only_the_named_plugin_is_asked(loaded: Load) -> None:
    active = loaded("success", "raises", cache=["good-cache:note=one", "raises-hook"])
    wrap = Tiny(torch.nn.Identity()).wrap(Manager(active[:1]), "cache")
    assert wrap is not None and wrap.report().what == "one"
    manager = Manager(active)
    wrap = manager.cache(Tiny(torch.nn.Identity()).network, a_run(run_id="x"), active[0])
    assert wrap is not None and wrap.report().reason == "x"


def test_managers_share_nothing(loaded: Load) -> None:
    one = Manager(loaded("success", solver="good-solver"))
    two = Manager([])
    assert one.of("solver") and not two.of("solver")


def test_hooks_of_a_class(loaded: Load) -> None:
    (active,) = loaded("success", solver="both")
    assert implemented_hooks(type(active.plugin)) == ["schedule", "solver"]
    assert implemented_hooks(int) == []


def test_rules_see_the_chain_and_the_run() -> None:
    ddim = load(Recipe(solver=Named("ddim", {"eta": 1})), installed(), "image")
    assert Manager(ddim).enforce_rules(["guided"]) == []
    cached = load(Recipe(solver=Named("ddim", {"eta": 1}), cache=(Named("fora"),)), installed(), "image")
    (finding,) = Manager(cached).enforce_rules(["guided"])
    assert "fora with ddim:eta=1" in finding.message
    assert [f.rule.id for f in Manager(cached).enforce_rules(["few-step"])] == ["C3b", "C4"]
    with pytest.raises(RuleError, match="this run"):
        Manager(ddim).enforce_rules(["guidance-distilled", "guided"])
