"""The conformance kit finds what it is for: each planted defect fails the check of its name, and only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from suite.call import active_call
from suite.diffusion.schedule import Schedule
from suite.diffusion.solver import Solver, SolverFacts, expand, transfer
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.network.patch import Patches
from suite.plugin import Plugin
from suite.testing import Check, Tiny, checks_for, parametrize_with_checks
from suite.wrap import Wrap, WrapReport
from suite.wrap import reuse as facts_of

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def outcome(plugin: Any, name: str) -> str:
    """Message of the failure of one check, or an empty string."""
    (check,) = [c for c in checks_for(plugin, "mine") if c.name == name]
    try:
        check()
    except AssertionError as error:
        assert str(error).startswith(f"plugin mine, check {name}: ")
        return str(error)
    return ""


# ---- every plugin ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing(Plugin):
    """A cache that finds nothing to do; each option plants a defect."""

    number: float = 0.5
    words: tuple[str, ...] = ("a", "b")

    summary = "nothing"

    @hookimpl
    def cache(self, network: Any) -> None:
        return None


@dataclass(frozen=True)
class Unmeasurable(Nothing):
    bench_options = ({"number": 1.0}, {"numbre": 2.0})


def test_settings_for_the_bench_must_be_settings() -> None:
    assert "hold mine:numbre=2.0, which it refuses" in outcome(Unmeasurable(), "bench_options_can_be_built")
    assert not outcome(Nothing(), "bench_options_can_be_built")


@dataclass(frozen=True)
class DefaultArgument(Plugin):
    summary = "a default"

    @hookimpl
    def cache(self, network: Any, interval: int = 3) -> None:
        return None


@dataclass(frozen=True)
class Misspelt(Plugin):
    summary = "misspelt"

    @hookimpl
    def cache(self, network: Any) -> None:
        return None

    @hookimpl
    def compres(self, network: Any) -> None:
        return None


@dataclass
class Thawed(Plugin):
    summary = "not frozen"

    @hookimpl
    def cache(self, network: Any) -> None:
        return None


@dataclass(frozen=True)
class Silent(Plugin):
    @hookimpl
    def cache(self, network: Any) -> None:
        return None


@dataclass(frozen=True)
class Inert(Plugin):
    summary = "no hook"


@dataclass(frozen=True)
class OddWord(Plugin):
    summary = "an unknown word"
    effects = frozenset({"vendor.word", "block-output"})

    @hookimpl
    def cache(self, network: Any) -> None:
        return None


@dataclass(frozen=True)
class Unreadable(Plugin):
    """Text cannot carry a comma in an option."""

    text: str = "a,b"

    summary = "unreadable"

    @hookimpl
    def cache(self, network: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("plugin", "check", "said"),
    [
        (DefaultArgument, "hook_arguments_have_no_defaults", "cache(interval=3)"),
        (Misspelt, "registers", "compres"),
        (Thawed, "is_a_plugin", "frozen"),
        (Silent, "is_a_plugin", "summary"),
        (Inert, "is_a_plugin", "implements none of"),
        (OddWord, "effects_are_known", "'block-output'"),
        (Unreadable, "options_round_trip", "expected name:key=value"),
    ],
)
def test_defects_of_any_plugin(plugin: type, check: str, said: str) -> None:
    assert said in outcome(plugin, check)
    assert outcome(Nothing, check) == ""


def test_a_heavy_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES / "heavy")
    from fixture_heavy import Heavy  # pyright: ignore[reportMissingImports]

    assert "imports torch" in outcome(Heavy, "import_is_light")


# ---- schedule ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times(Schedule):
    defect: str
    calls: list[int] = field(default_factory=list, compare=False)

    def timesteps(self, noise: Any, steps: int) -> Tensor:
        self.calls.append(steps)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        match self.defect:
            case "short":
                return times[:-1]
            case "float32":
                return times.float()
            case "rising":
                return times.flip(0)
            case "ends early":
                return times * 0.9 + 0.1
            case "repeats":
                return torch.cat([times[:1], times[:-1]]) if steps > 40 else times
            case "counts":
                return times ** len(self.calls)
        return times

    def training_times(self, batch: int, rng: torch.Generator) -> Tensor:
        if self.defect == "global":
            return torch.rand(batch, dtype=torch.float64)
        return super().training_times(batch, rng) * (1000 if self.defect == "thousand" else 1)


@dataclass(frozen=True)
class BadTimes(Plugin):
    defect: str = ""

    summary = "times"

    @hookimpl
    def schedule(self, noise: Any) -> Schedule:
        if self.defect == "vp only" and noise.family == "ve":
            raise ConfigError("no VE")
        return Times(self.defect)


@pytest.mark.parametrize(
    ("defect", "check", "said"),
    [
        ("short", "schedule_times", "expected 2"),
        ("float32", "schedule_times", "expected float64"),
        ("rising", "schedule_times", "do not decrease"),
        ("ends early", "schedule_times", "from 1 to 0"),
        ("repeats", "schedule_times", "steps: the schedule's times do not decrease"),
        ("vp only", "schedule_times", "refuses ve (no VE)"),
        ("counts", "schedule_is_a_value", "the second answer differs"),
        ("global", "schedule_training_times", "equal generators"),
        ("thousand", "schedule_training_times", "outside [0, 1]"),
    ],
)
def test_defects_of_a_schedule(defect: str, check: str, said: str) -> None:
    assert said in outcome(BadTimes(defect), check)
    assert outcome(BadTimes(), check) == ""


def test_a_grid_that_is_lossless_claims_nothing_and_is_told_so() -> None:
    @dataclass(frozen=True)
    class Boasts(BadTimes):
        lossless = True

    assert "`lossless` means nothing of a schedule" in outcome(Boasts(), "is_a_plugin")
    assert outcome(BadTimes(), "is_a_plugin") == ""


# ---- solver ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stepper(Solver):
    noise: Any
    defect: str
    kept: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        order = 2 if self.defect == "boasts" else 1
        return SolverFacts(order, stochastic=self.defect == "noisy", variable=self.defect == "rests and says so")

    def step(self, denoise: Any, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: Any) -> tuple[Tensor, Any]:
        if "rests" in self.defect and s == 0:
            return x, state
        x0 = denoise(x, t)
        out = transfer(self.noise, x, x0, t, s)
        match self.defect:
            case "surveys equation 8":
                eps = (x - expand(self.noise.alpha(t), x) * x0) / expand(self.noise.sigma(t), x)
                kept = x - expand(self.noise.sigma(t), x) * eps
                out = expand(self.noise.alpha(s), x) * kept + expand(self.noise.sigma(s), x) * eps
            case "divides by alpha":
                ratio = self.noise.alpha(s) / self.noise.alpha(t)
                eps = (x - expand(self.noise.alpha(t), x) * x0) / expand(self.noise.sigma(t), x)
                moved = self.noise.sigma(s) - self.noise.sigma(t) * ratio
                out = expand(ratio, x) * x + expand(moved, x) * eps
            case "twice":
                denoise(x, t)
            case "noisy":
                out = out + 0.1 * expand(self.noise.sigma(s), x) * torch.randn_like(x)
            case "in place":
                x.add_(1)
            case "remembers":
                self.kept.append(x0)
                if len(self.kept) > 1 and self.kept[-2].shape == x.shape:
                    out = out + 1e-3 * (x0 - self.kept[-2])
            case "batch mean":
                out = out + 1e-2 * (x.mean(0) - x)
            case "half":
                out = out.half()
        return out, state


@dataclass(frozen=True)
class BadStepper(Plugin):
    defect: str = ""

    summary = "step"

    @hookimpl
    def solver(self, noise: Any) -> Solver:
        return Stepper(noise, self.defect)


@pytest.mark.parametrize(
    ("defect", "check", "said"),
    [
        ("surveys equation 8", "solver_is_exact_on_a_constant", "off by"),
        ("divides by alpha", "solver_is_finite_at_both_ends", "not finite"),
        ("boasts", "solver_has_its_order", "claimed 2"),
        ("twice", "solver_evaluations", "2 evaluations, but evaluations(1) = 1"),
        ("rests", "solver_evaluations", "0 evaluations, but evaluations(1) = 1; if that depends on the data, say"),
        ("rests and says so", "solver_facts_are_effects", "variable-evaluations; add to `effects`"),
        ("noisy", "solver_same_seed_same_output", "two runs differ"),
        ("noisy", "solver_facts_are_effects", "stochastic-step; add to `effects`"),
        ("in place", "solver_state_is_a_value", "changes x in place"),
        ("remembers", "solver_state_is_a_value", "two steps from one state differ"),
        ("batch mean", "solver_ignores_the_batch", "a sample alone differs"),
        ("half", "solver_is_finite_at_both_ends", "dtype torch.float16"),
    ],
)
def test_defects_of_a_solver(defect: str, check: str, said: str) -> None:
    assert said in outcome(BadStepper(defect), check)
    assert outcome(BadStepper(), check) == ""


def test_a_solver_may_evaluate_less_than_it_says_if_it_says_that_too() -> None:
    assert outcome(BadStepper("rests and says so"), "solver_evaluations") == ""


# ---- wraps -------------------------------------------------------------------------------------


@dataclass
class Reuse:
    """Reuses the output of every block at odd steps; right where `defect` is empty."""

    defect: str
    kept: dict[Any, Tensor] = field(default_factory=dict)
    count: int = 0
    calls: dict[Any, int] = field(default_factory=dict)

    def make(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            call = active_call()
            key = (name, call.evaluation) if self.defect == "one branch" else (name, call.branch, call.evaluation)
            self.calls[key] = self.calls.get(key, 0) + 1
            odd = call.step % 2 == 1
            if self.defect == "never resets":
                odd = self.calls[key] % 2 == 0
            if self.defect == "never resets":  # a counter of its own, out of step with the next run
                self.calls[key] = self.calls.get(key, 0) + 1
                odd = self.calls[key] % 5 != 1
            if odd and key in self.kept and self.kept[key].shape[0] == args[0].shape[0]:
                self.count += 1
                return self.kept[key]
            out = forward(*args, **kwargs)
            if self.defect == "batch mean":
                out = out + 0.1 * (out.mean(0) - out)
            if self.defect == "random":
                out = out + 1e-3 * torch.randn_like(out)
            self.kept[key] = out
            return out

        return answer


#: What a plugin must not have: state that outlives the run.
LEFT: WeakKeyDictionary[nn.Module, Reuse] = WeakKeyDictionary()


@dataclass(frozen=True)
class BadCache(Plugin):
    defect: str = ""
    off: bool = False

    summary = "cache"
    noop_options: ClassVar[dict[str, Any]] = {"off": True}

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.defect == "boasts"

    @hookimpl
    def cache(self, network: Any) -> Wrap:
        patches, reuse = Patches(), Reuse(self.defect)
        if self.defect == "never resets":
            reuse = LEFT.setdefault(network.module, reuse)

        def install(module: nn.Module) -> nn.Module:
            for ref in [] if self.off else network.blocks("block"):
                patches.replace(ref.module, lambda forward, name=ref.name: reuse.make(name, forward))
            if self.defect == "wrong shape":
                patches.replace(module, lambda forward: lambda *a, **k: (forward(*a, **k)[0][:, :2],))
            if self.defect == "changes weights":
                next(module.parameters()).data.mul_(1.0 + 2**-20)
            return module

        def report() -> WrapReport:
            if self.defect == "gives no reason":
                return WrapReport(0, "block calls reused")
            held = 0 if self.defect == "hides bytes" else most
            facts = facts_of(hits=reuse.count, misses=1, skipped_share=0.5, bytes_held=held)
            if self.defect == "no hits":
                del facts["hits"]
            return WrapReport(reuse.count, "block calls reused", facts, "" if reuse.count else "off")

        def undo() -> None:
            patches.undo()
            if self.defect != "keeps its memory":
                reuse.kept.clear()

        def held() -> int:
            return sum(x.nbytes for x in reuse.kept.values())

        most = 2**40
        return Wrap(
            network=install,
            report=report,
            undo=None if self.defect == "undoes nothing" else undo,
            held=None if self.defect == "says nothing" else held,
        )


@dataclass(frozen=True)
class BadOff(BadCache):
    """Its off setting acts."""

    off: bool = False
    noop_options: ClassVar[dict[str, Any]] = {"off": False}


@dataclass(frozen=True)
class BadRanks(Plugin):
    """A parallelizer that averages over the ranks; each option plants a defect."""

    defect: str = ""

    summary = "ranks"
    lossless = True

    @hookimpl
    def parallelize(self, mesh: Any) -> Wrap:
        @dataclass(frozen=True)
        class Averaging:
            inner: Any

            def denoise(self, x: Tensor, t: Tensor, cond: Any, call: Any) -> Tensor:
                out = self.inner.denoise(x, t, cond, call)
                if defect == "skips a collective" and mesh.rank and call.step > 2:
                    return out
                if defect == "ranks differ":
                    return out + 1e-3 * mesh.rank
                parts = mesh.all_gather(out)
                return parts[0] + (0.01 if defect == "boasts" else 0.0)

        defect = self.defect
        return Wrap(report=lambda: WrapReport(1, "calls"), denoiser=Averaging)


@pytest.mark.parametrize(
    ("plugin", "check", "said"),
    [
        (BadCache("wrong shape"), "wrap_keeps_shape_and_dtype", "(2, 2, 8, 8)"),
        (BadCache("random"), "wrap_same_seed_same_output", "equal seeds differ"),
        (BadCache("never resets"), "wrap_two_runs_in_a_row", "the second run differs"),
        (BadCache("one branch"), "wrap_keeps_branches_apart", "`cond` differs"),
        (BadCache("batch mean"), "wrap_ignores_the_batch", "more than batch_tolerance"),
        (BadCache("undoes nothing"), "wrap_undo_restores", "transformer_blocks.0"),
        (BadCache("changes weights"), "wrap_undo_restores", "declare the effect `weights`"),
        (BadCache("gives no reason"), "wrap_reports", "gives no `reason`"),
        (BadCache("boasts"), "wrap_lossless_claim", "claims `lossless`"),
        (BadCache("no hits"), "cache_reports_its_reuse", "hits = None: expected a count"),
        (BadCache("says nothing"), "cache_says_what_it_holds", "give its Wrap `held`"),
        (BadCache("hides bytes"), "cache_says_what_it_holds", "but the report's bytes_held = 0"),
        (BadCache("keeps its memory"), "cache_says_what_it_holds", "after the run: let go in `undo`"),
        (BadOff(), "wrap_off_setting_is_plain", "mine:off=False differs"),
        (BadRanks("skips a collective"), "parallelize_two_ranks", "different collectives"),
        (BadRanks("ranks differ"), "parallelize_two_ranks", "the ranks differ"),
        (BadRanks("boasts"), "parallelize_two_ranks", "claims `lossless`"),
    ],
    ids=lambda v: getattr(v, "defect", v),
)
def test_defects_of_a_wrap(plugin: Plugin, check: str, said: str) -> None:
    LEFT.clear()
    assert said in outcome(plugin, check)
    assert outcome(BadRanks() if isinstance(plugin, BadRanks) else BadCache(), check) == ""


# ---- the kit's own ways --------------------------------------------------------------------------


def test_checks_follow_the_hooks() -> None:
    names = {p: {c.name for c in checks_for(p)} for p in (BadTimes, BadStepper, BadCache, BadRanks)}
    shared = set.intersection(*names.values())
    assert {"registers", "import_is_light", "options_round_trip"} <= shared
    assert all(n.startswith("schedule_") for n in names[BadTimes] - shared)
    assert all(n.startswith("solver_") for n in names[BadStepper] - shared)
    assert all(n.startswith(("wrap_", "cache_")) for n in names[BadCache] - shared)
    assert names[BadRanks] - names[BadCache] == {"parallelize_two_ranks"}
    assert {n for n in names[BadCache] - names[BadRanks]} == {"cache_reports_its_reuse", "cache_says_what_it_holds"}


@parametrize_with_checks(
    {"good": BadCache, "bad": BadCache("one branch")},
    expected_failed_checks={
        "bad-wrap_keeps_branches_apart": "planted",
        "bad-wrap_treats_branches_alike_together_and_apart": "planted",
        "import_is_light": "a test module has no importable name",
    },
)
def test_expected_failures(check: Check) -> None:
    check()


def test_an_unknown_expected_failure_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no check 'wrap_flies'; checks: "):
        parametrize_with_checks([BadCache], expected_failed_checks={"wrap_flies": "why"})


def test_every_expected_failure_is_strict() -> None:
    mark = parametrize_with_checks([Nothing], expected_failed_checks={"registers": "why"}).mark
    (marked,) = [p for p in mark.args[1] if p.marks]
    assert marked.id == "Nothing-registers" and marked.marks[0].kwargs["strict"] is True


def test_fixtures(tiny: Tiny, tiny_network: Any, oracle_gaussian: Any, oracle_mixture: Any, oracle_point: Any) -> None:
    assert tiny_network.module is tiny.module and len(tiny_network.blocks("block")) == 4
    x, t = torch.zeros(2, 1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    assert oracle_gaussian.mean == 0.7
    for target in (oracle_gaussian, oracle_mixture, oracle_point):
        assert target.denoiser(tiny.noise)(x, t).shape == x.shape


def test_tiny_depends_on_its_seed_alone() -> None:
    one, two = Tiny.build(), Tiny.build()
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    got = replace(one, guidance=1.0).generate((0, 1))
    assert got.counter.nfe == got.counter.depth == one.steps
    assert one.generate((0, 1)).counter.nfe == 2 * one.steps


@dataclass(frozen=True)
class _Keeps(Plugin):
    """Names a folder without saying so."""

    cache_dir: str = ""
    summary = "keeps"

    @hookimpl
    def cache(self) -> None: ...


def test_an_option_that_names_a_path_must_say_so() -> None:
    assert "declare it as `cache_dir: PathOption`" in outcome(_Keeps, "paths_are_declared")
