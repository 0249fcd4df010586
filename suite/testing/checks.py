"""The conformance kit: small named checks of what the hooks promise, made for any plugin.

A check raises AssertionError whose message begins with the plugin's and the check's name.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor, nn

from suite.call import Call
from suite.discovery import Entry
from suite.errors import ConfigError
from suite.hookspecs import HOOKS, PROJECT
from suite.manager import Active, Manager, implemented_hooks
from suite.mesh import Mesh
from suite.noise import (
    VE,
    Cosine,
    Flow,
    Laplace,
    Masked,
    NoiseSchedule,
    ResShift,
    Sigmoid,
    Sqrt,
    SubVP,
    TrigFlow,
    VPGamma,
    VPLinear,
    VPTable,
)
from suite.noise import Uniform as UniformNoise
from suite.plugin import EFFECT_WORDS, Plugin, build, options_of
from suite.recipe import Named, Recipe
from suite.rng import SampleRng
from suite.schedule import Schedule, check_timesteps
from suite.solver import AdaptiveSolver, Denoise, Solver
from suite.testing.oracles import Mixture, PointMass, Tokens, a_run, drive, moments, observed_order
from suite.testing.tiny import Outcome, Tiny, TinyTokens
from suite.wrap import Wrap

#: Every family of real-valued noise, one member each.
CONTINUOUS: tuple[NoiseSchedule, ...] = (
    VPLinear(), Cosine(), Sqrt(), Sigmoid(), Laplace(), VPTable.named("scaled_linear", 100), VPGamma(), SubVP(), VE(),
    Flow(), TrigFlow(), ResShift(),
)  # fmt: skip
#: The kinds of end points: alpha(1) > 0 and = 0, alpha = 1 throughout, sigma(0) > 0.
ENDS: tuple[NoiseSchedule, ...] = (VPLinear(), Cosine(), VE(), Flow(), TrigFlow(), Sqrt())
DISCRETE: tuple[NoiseSchedule, ...] = (Masked(), Masked("cosine"), UniformNoise())
#: Importing a plugin's module must not import these.
HEAVY = ("torch", "diffusers", "transformers", "triton")
ORDER_TOLERANCE = 0.15
LOSSLESS_FACTOR = 1.5
WRAPS = ("compress", "parallelize", "cache")


@dataclass(frozen=True)
class Subject:
    """A plugin under test, as the engine would hold it."""

    name: str
    plugin: Any

    @property
    def cls(self) -> type[Plugin]:
        return type(self.plugin)

    def manager(self, hook: str, plugin: Any = None) -> Manager:
        """A manager with this plugin alone, for one hook."""
        target = f"{self.cls.__module__}:{self.cls.__qualname__}"
        entry = Entry(self.name, target, "under test", "0")
        return Manager([Active(entry, plugin or self.plugin, hook, self.name)])

    def schedule(self, noise: NoiseSchedule, steps: int = 10) -> Schedule:
        """Its schedule for this noise."""
        return self.manager("schedule").schedule(noise, a_run(steps=steps))

    def solver(self, noise: NoiseSchedule, steps: int = 10) -> Solver:
        """Its solver for this noise."""
        return self.manager("solver").solver(noise, a_run(steps=steps))


@dataclass(frozen=True)
class Check:
    """One check of one plugin; call it."""

    plugin: str
    name: str
    run: Callable[[], None]

    @property
    def id(self) -> str:
        """`plugin-check`, as pytest shows it."""
        return f"{self.plugin}-{self.name}"

    def __call__(self) -> None:
        try:
            self.run()
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"plugin {self.plugin}, check {self.name}: {kind}{error}") from error


_COMMON: list[Callable[[Subject], None]] = []
_BY_HOOK: dict[str, list[Callable[[Subject], None]]] = {"schedule": [], "solver": [], "parallelize": []}
_WRAP: list[Callable[[Subject, str], None]] = []


def _common(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    _COMMON.append(function)
    return function


def _of(hook: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        _BY_HOOK[hook].append(function)
        return function

    return register


def _of_wraps(function: Callable[[Subject, str], None]) -> Callable[[Subject, str], None]:
    _WRAP.append(function)
    return function


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

    for function in _COMMON:
        yield check(function)
    hooks = implemented_hooks(subject.cls)
    for hook in hooks:
        for function in _BY_HOOK.get(hook, ()):
            yield check(function)
    wraps = [h for h in hooks if h in WRAPS]
    for hook in wraps:
        for wrap_function in _WRAP:
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


# ---- every plugin ------------------------------------------------------------------------------


@_common
def check_is_a_plugin(subject: Subject) -> None:
    """A frozen dataclass below `Plugin`, with a summary, that implements a hook."""
    cls = subject.cls
    assert issubclass(cls, Plugin), f"{cls.__name__} is not a subclass of suite.Plugin"
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert frozen, f"{cls.__name__} is not a frozen dataclass; write @dataclass(frozen=True)"
    assert cls.summary, "`summary` is empty; `suite plugins list` shows it"
    assert implemented_hooks(cls), f"it implements none of {', '.join(HOOKS)}; mark a method with @hookimpl"
    modalities = cls.modalities
    assert modalities is None or isinstance(modalities, frozenset), "`modalities` must be None or a frozenset"


@_common
def check_registers(subject: Subject) -> None:
    """pluggy accepts it, and no marked method is left without a hook."""
    for hook in implemented_hooks(subject.cls):
        subject.manager(hook)


@_common
def check_hook_arguments_have_no_defaults(subject: Subject) -> None:
    """An argument with a default is never filled by pluggy."""
    for name in dir(subject.cls):
        method = getattr(subject.cls, name, None)
        if getattr(method, f"{PROJECT}_impl", None) is None:
            continue
        for argument in inspect.signature(method).parameters.values():  # pyright: ignore[reportArgumentType]
            assert argument.default is inspect.Parameter.empty, (
                f"{name}({argument.name}={argument.default!r}): pluggy never fills an argument that has a default; "
                "make it an option of the plugin"
            )


@_common
def check_import_is_light(subject: Subject) -> None:
    """Listing and checking a recipe import the module, so it must not import torch."""
    module = subject.cls.__module__
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"import {module} fails in a fresh process: {done.stderr.strip()[-500:]}"
    assert not done.stdout.split(), (
        f"import {module} imports {done.stdout.strip()}; import it inside the hook, or under TYPE_CHECKING"
    )


@_common
def check_options_round_trip(subject: Subject) -> None:
    """Options written as text and as YAML are read back equal; an unknown one is refused."""
    cls, values = subject.cls, {k: getattr(subject.plugin, k) for k in options_of(subject.cls)}
    # An empty text or sequence cannot be written; leaving the option out says it.
    written = {k: v for k, v in values.items() if not (isinstance(v, str | list | tuple) and not v)}
    named = Named.parse(str(Named(subject.name, written)))
    assert build(cls, named.options, name=subject.name) == subject.plugin, f"{named} is read back differently"
    for hook in implemented_hooks(cls):
        value = str(named) if hook in ("schedule", "solver") else [str(named)]
        recipe = Recipe.from_dict(yaml.safe_load(yaml.safe_dump({hook: value})))
        again = Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
        ((_, read),) = again.named()
        assert build(cls, read.options, name=subject.name) == subject.plugin, f"YAML {value!r} is read back differently"
    try:
        build(cls, {"no_such_option": 1}, name=subject.name)
    except ConfigError as error:
        assert "no_such_option" in str(error), f"the refusal of an unknown option does not name it: {error}"
    else:
        raise AssertionError("the unknown option no_such_option is accepted")


@_common
def check_bench_options_can_be_built(subject: Subject) -> None:
    """Each setting that it asks `suite bench` to measure is one, and can be written as text."""
    for options in subject.cls.bench_options if "bench_options" in vars(subject.cls) else ():
        named = Named.parse(str(Named(subject.name, options)))
        try:
            build(subject.cls, named.options, name=subject.name)
        except ConfigError as error:
            raise AssertionError(f"its bench_options hold {named}, which it refuses: {error}") from error


@_common
def check_effects_are_known(subject: Subject) -> None:
    """Words are of the suite's list, or one's own with a dot, so that rules can match them."""
    effects = subject.plugin.effects
    assert isinstance(effects, frozenset), f"`effects` must be a frozenset, got {type(effects).__name__}"
    unknown = sorted(w for w in effects if w not in EFFECT_WORDS and "." not in w)
    assert not unknown, f"unknown effect {unknown[0]!r}; known: {', '.join(EFFECT_WORDS)}; a word of your own has a dot"


# ---- schedule ----------------------------------------------------------------------------------


def _schedules(subject: Subject, steps: int) -> list[tuple[NoiseSchedule, Schedule]]:
    """Those it makes: for all families of real-valued noise or for none of them, and for tokens if it can.

    A grid that was fitted to one model may refuse all but its own noise and number of steps.
    """
    made, refused = [], []
    for noise in (*CONTINUOUS, *DISCRETE):
        try:
            made.append((noise, subject.schedule(noise, steps)))
        except ConfigError as error:
            refused.append((noise, error))
    if _fitted(subject):
        return made
    assert made, f"it refuses every noise schedule; the last: {refused[-1][1]}"
    if any(not noise.discrete for noise, _ in made):
        families = [f"{noise.family} ({error})" for noise, error in refused if not noise.discrete]
        assert not families, f"it serves some real-valued noise but refuses {families[0]}"
    return made


def _fitted(subject: Subject) -> bool:
    return "optimised-grid" in subject.plugin.effects


def _some_schedules(subject: Subject) -> tuple[int, list[tuple[NoiseSchedule, Schedule]]]:
    """(steps, schedules): of 7 steps, or of the first number that a fitted grid serves."""
    for steps in (7, *range(1, 51)):
        if made := _schedules(subject, steps):
            return steps, made
    raise AssertionError("it serves no noise schedule at any number of steps from 1 to 50")


@_of("schedule")
def check_schedule_times(subject: Subject) -> None:
    """steps + 1 float64 times, strictly decreasing from 1 to 0, for 1 to 50 steps of every family."""
    _some_schedules(subject)
    for steps in range(1, 51):
        for noise, schedule in _schedules(subject, steps):
            times = schedule.timesteps(noise, steps)
            assert times.dtype is torch.float64, f"{noise.family}: times are {times.dtype}, expected float64"
            try:
                check_timesteps(times, steps)
            except ConfigError as error:
                raise AssertionError(f"{noise.family}, {steps} steps: {error}") from error
            if times.ndim == 1:
                assert (times[1:] < times[:-1]).all(), f"{noise.family}, {steps} steps: two times are equal"


@_of("schedule")
def check_schedule_is_a_value(subject: Subject) -> None:
    """Asking twice gives the same times."""
    steps, schedules = _some_schedules(subject)
    for noise, schedule in schedules:
        first = schedule.timesteps(noise, steps).clone()
        if not _fitted(subject):
            schedule.timesteps(noise, 3)
        assert torch.equal(first, schedule.timesteps(noise, steps)), f"{noise.family}: the second answer differs"


@_of("schedule")
def check_schedule_training_times(subject: Subject) -> None:
    """Training times are in [0, 1] and depend on the generator alone."""
    for noise, schedule in _some_schedules(subject)[1]:
        one, two = (schedule.training_times(64, torch.Generator().manual_seed(3)) for _ in range(2))
        assert one.shape[0] == 64, f"{noise.family}: {tuple(one.shape)} training times for a batch of 64"
        assert ((one >= 0) & (one <= 1)).all(), f"{noise.family}: training times outside [0, 1]"
        assert torch.equal(one, two), f"{noise.family}: equal generators give different training times"


# ---- solver ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A solver with a problem it can step: times from 1 to 0, an exact denoiser, and a prior."""

    noise: NoiseSchedule
    solver: Solver
    times: Tensor
    denoise: Denoise
    prior: Callable[[SampleRng], Tensor]

    def sample(self, seeds: tuple[int, ...], denoise: Denoise | None = None) -> Tensor:
        rng = SampleRng(seeds)
        return drive(self.solver, self.times, denoise or self.denoise, self.prior(rng), rng=rng)


def _discrete(subject: Subject) -> bool:
    for noise in (VPLinear(), *DISCRETE):
        try:
            return subject.solver(noise).facts.discrete
        except ConfigError:
            continue
    raise AssertionError("it makes no solver for any noise schedule")


def _cases(subject: Subject, steps: int = 10) -> list[_Case]:
    """The solver on every kind of end point (or of token noise), in the engine's float32."""
    out = []
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if _discrete(subject):
        for noise in DISCRETE:
            try:
                solver = subject.solver(noise, steps)
            except ConfigError:
                continue  # a rule for masks need not fit uniform noise
            target = Tokens.random(masked=isinstance(noise, Masked))
            out.append(_Case(noise, solver, times, target.denoiser(noise), target.prior))
        return out
    for noise in ENDS:
        sigma = float(noise.sigma(1.0))

        def prior(rng: SampleRng, sigma: float = sigma) -> Tensor:
            return sigma * rng.normal((3,))

        denoise = Mixture.two((3,)).denoiser(noise)
        out.append(_Case(noise, subject.solver(noise, steps), times, denoise, prior))
    return out


def _steps(subject: Subject, *wanted: int) -> list[int]:
    fewest = max(c.solver.facts.min_steps for c in _cases(subject, 50))
    return sorted({max(fewest, n) for n in wanted})


@_of("solver")
def check_solver_facts_are_effects(subject: Subject) -> None:
    """What the solver is must be among the plugin's effects, where rules see it."""
    for case in _cases(subject):
        missing = sorted(case.solver.facts.words - subject.plugin.effects)
        assert not missing, f"its solver is {', '.join(missing)}; add to `effects`"


@_of("solver")
def check_solver_is_exact_on_a_constant(subject: Subject) -> None:
    """With all data at one point every step is exact, because x0 is known: one step suffices.

    A solver that discretises the linear part too (`exact` is False) must converge there instead; one of order 0
    need not.
    """
    if _discrete(subject):
        return
    for noise in ENDS:
        solver = subject.solver(noise)
        target = PointMass(0.7)
        if not solver.facts.exact:
            if solver.facts.order and solver.facts.affine:
                got = observed_order(lambda n: subject.solver(n), noise, (20, 80), target)
                assert got > 0.5, f"{noise.family}: with x0 known the error falls with order {got:.2f} only"
            continue
        count = solver.facts.min_steps
        for first, last in ((1.0, 0.0), (1.0, 0.3), (0.8, 0.3), (0.8, 0.0)):
            times = torch.linspace(first, last, count + 1, dtype=torch.float64)
            where = f"{noise.family}, t = {first} to {last} in {count} steps"
            mean, variance = target.marginal(noise, times[0])
            if solver.facts.adaptive or not solver.facts.stochastic:
                x = mean + variance.sqrt() * torch.tensor([[-1.2], [0.3], [2.0]], dtype=torch.float64)
                error = (
                    drive(solver, times, target.denoiser(noise), x) - target.flow_map(noise, x, *times[[0, -1]])
                ).abs()
                assert error.max() < 1e-10, f"{where}: off by {float(error.max()):.2g}"
            else:
                got = torch.stack(moments(solver, times, target.denoiser(noise), mean, variance))
                error = (got - torch.stack(target.marginal(noise, times[-1]))).abs().max()
                assert error < 1e-10, f"{where}: mean or variance off by {float(error):.2g}"


@_of("solver")
def check_solver_has_its_order(subject: Subject) -> None:
    """The error on analytic Gaussian data falls with the claimed order."""
    if _discrete(subject):
        return
    for noise in (VPLinear(), Cosine(), VE(), Flow()):
        facts = subject.solver(noise).facts
        if facts.adaptive or not facts.affine:
            return  # no grid to refine, or a law that no probe gives: its own tests must show it
        got = observed_order(lambda n: subject.solver(n), noise)
        assert got > facts.order - ORDER_TOLERANCE, f"{noise.family}: order {got:.2f}, claimed {facts.order}"
        assert got < facts.order + 1 - ORDER_TOLERANCE, (
            f"{noise.family}: order {got:.2f}, so claim more than {facts.order}"
        )


@_of("solver")
def check_solver_evaluations(subject: Subject) -> None:
    """It evaluates as often as it says, for few and many steps."""
    for steps in _steps(subject, 1, 2, 5, 10):
        for case in _cases(subject, steps):
            count = 0

            def counted(x: Tensor, t: Tensor, case: _Case = case) -> Tensor:
                nonlocal count
                count += 1
                return case.denoise(x, t)

            case.sample((0, 1), counted)
            said = case.solver.evaluations(steps)
            where = f"{case.noise.family}, {steps} steps"
            assert count <= said, f"{where}: {count} evaluations, but evaluations({steps}) = {said}"
            if not isinstance(case.solver, AdaptiveSolver):
                assert count == said or case.solver.facts.variable, (
                    f"{where}: {count} evaluations, but evaluations({steps}) = {said}; "
                    "if that depends on the data, say `variable` in its facts"
                )
                most = case.solver.facts.evaluations * steps
                assert count <= most, f"{where}: {count} evaluations, but facts.evaluations allows {most}"


@_of("solver")
def check_solver_same_seed_same_output(subject: Subject) -> None:
    """The same solver object, run twice, gives the same numbers."""
    for case in _cases(subject):
        assert torch.equal(case.sample((0, 1)), case.sample((0, 1))), f"{case.noise.family}: two runs differ"


@_of("solver")
def check_solver_ignores_the_batch(subject: Subject) -> None:
    """A sample in a batch is the sample alone."""
    for case in _cases(subject):
        together = case.sample((4, 5, 6))
        alone = torch.cat([case.sample((seed,)) for seed in (4, 5, 6)])
        # Not bit for bit: vectorised functions round the tail of an array differently.
        difference = float((together - alone).abs().max())
        assert difference <= 1e-4, f"{case.noise.family}: a sample alone differs by {difference:.2g}"


@_of("solver")
def check_solver_state_is_a_value(subject: Subject) -> None:
    """Two steps from one state give the same result: nothing is changed in place or kept inside."""
    for case in _cases(subject):
        if isinstance(case.solver, AdaptiveSolver):
            continue
        x, state = case.prior(SampleRng((0, 1))), case.solver.begin(a_run(steps=10), case.times)
        for step in range(10):
            t, s = case.times[step], case.times[step + 1]
            before = x.clone()
            first, after = case.solver.step(case.denoise, x, t, s, state, SampleRng((step, 9)))
            second, _ = case.solver.step(case.denoise, x, t, s, state, SampleRng((step, 9)))
            where = f"{case.noise.family}, step {step}"
            assert torch.equal(x, before), f"{where}: it changes x in place"
            assert torch.equal(first, second), f"{where}: two steps from one state differ"
            x, state = first, after


@_of("solver")
def check_solver_is_finite_at_both_ends(subject: Subject) -> None:
    """No infinity or runaway where alpha = 0 or sigma = 0; shape and dtype are kept."""
    for steps in _steps(subject, 1, 2, 3, 10, 50):
        for case in _cases(subject, steps):
            x = case.prior(SampleRng((0, 1, 2)))
            out = case.sample((0, 1, 2))
            where = f"{case.noise.family}, {steps} steps"
            assert out.shape == x.shape, f"{where}: shape {tuple(out.shape)}, expected {tuple(x.shape)}"
            assert out.dtype is x.dtype, f"{where}: dtype {out.dtype}, expected {x.dtype}"
            assert out.isfinite().all(), f"{where}: not finite"
            if case.noise.discrete:
                assert isinstance(case.noise, UniformNoise) or (out != 4).all(), f"{where}: masks are left"
            else:
                assert out.abs().max() < 20, f"{where}: |x0| = {float(out.abs().max()):.3g}, but data are within 3"


# ---- compress, parallelize, cache ----------------------------------------------------------------


@cache
def _built_once(network: str, tokens: bool) -> Tiny:
    return TinyTokens.build() if tokens else Tiny.build(network=network)


def _tiny(subject: Subject) -> Tiny:
    """The network that a plugin is checked on: over tokens if it needs them, else of the kind that it asks for."""
    return _built_once(subject.cls.kit_network, "needs-tokens" in subject.plugin.effects)


@dataclass
class _Wrapped:
    """A wrap on a copy of the tiny network."""

    tiny: Tiny
    wrap: Wrap | None

    def generate(self, seeds: tuple[int, ...], batched: bool = True) -> Outcome:
        return self.tiny.generate(seeds, self.wrap, batched=batched)


def _wrapped(subject: Subject, hook: str, seeds: tuple[int, ...] = (0,), plugin: Any = None) -> _Wrapped:
    tiny = _tiny(subject).copy()
    return _Wrapped(tiny, tiny.wrap(subject.manager(hook, plugin), hook, tiny.run(seeds)))


def _state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of all tensors, and which objects and replaced forwards stand where."""
    tensors = {k: v.clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}
    structure = {
        name: (id(part), id(part.__dict__.get("forward")), tuple(part._forward_hooks), tuple(part._forward_pre_hooks))
        for name, part in module.named_modules()
    }
    return tensors, structure


@_of_wraps
def check_wrap_keeps_shape_and_dtype(subject: Subject, hook: str) -> None:
    """The wrapped network and the whole run give the plain one's shape and dtype."""
    wrapped = _wrapped(subject, hook, (0, 1))
    before = wrapped.tiny.once(wrapped.tiny.module, (0, 1))
    module = wrapped.tiny.module
    if wrapped.wrap and wrapped.wrap.network:
        module = wrapped.wrap.network(module)
        assert isinstance(module, nn.Module), f"its network part returned {type(module).__name__}"
    after = wrapped.tiny.once(module, (0, 1))
    assert after.shape == before.shape, f"the network gives {tuple(after.shape)}, expected {tuple(before.shape)}"
    assert after.dtype is before.dtype, f"the network gives {after.dtype}, expected {before.dtype}"
    out = _wrapped(subject, hook, (0, 1)).generate((0, 1)).x0
    prior = wrapped.tiny.prior((0, 1))
    assert out.shape == prior.shape and out.dtype is prior.dtype, f"x0 is {tuple(out.shape)} {out.dtype}"
    assert out.isfinite().all(), "x0 is not finite"


@_of_wraps
def check_wrap_same_seed_same_output(subject: Subject, hook: str) -> None:
    """Two networks, two wraps, one seed: one result."""
    one, two = (_wrapped(subject, hook).generate((0,)).x0 for _ in range(2))
    assert torch.equal(one, two), f"equal seeds differ by {float((one - two).abs().max()):.2g}"


@_of_wraps
def check_wrap_two_runs_in_a_row(subject: Subject, hook: str) -> None:
    """A second run on the same network, with a fresh wrap, gives the first one's result: no state is left."""
    tiny, manager = _tiny(subject).copy(), subject.manager(hook)
    if "weights" in subject.plugin.effects:
        # Such a wrap is made once a load and stays: the second run uses it again.
        kept = tiny.wrap(manager, hook)
        assert torch.equal(tiny.generate((0,), kept).x0, tiny.generate((0,), kept).x0), "the second run differs"
        return
    outs = []
    for _ in range(2):
        wrap = tiny.wrap(manager, hook)
        outs.append(tiny.generate((0,), wrap).x0)
        if wrap and wrap.undo:
            wrap.undo()
    assert torch.equal(*outs), f"the second run differs by {float((outs[0] - outs[1]).abs().max()):.2g}"


@_of_wraps
def check_wrap_keeps_branches_apart(subject: Subject, hook: str) -> None:
    """What `cond` gives does not depend on whether `uncond` is evaluated between, before, or not at all."""

    def conditional(order: tuple[str, ...]) -> list[Tensor]:
        wrapped = _wrapped(subject, hook)
        denoiser, cond = wrapped.tiny.denoiser(wrapped.wrap), wrapped.tiny.cond((0,))
        steps, out = wrapped.tiny.steps, []
        for step in range(steps):
            t = 1 - step / steps
            for branch in order:
                call = Call(step, steps, t, t - 1 / steps, branch=branch, run_id="branches")
                with torch.inference_mode():
                    # A state of its own a step, equal for all orders: only the wrap can make them differ.
                    state = wrapped.tiny.state((0,), step)
                    got = denoiser.denoise(state, torch.tensor(t, dtype=torch.float64), cond[branch], call)
                if branch == "cond":
                    out.append(got.clone())
        return out

    alone = conditional(("cond",))
    for order in (("cond", "uncond"), ("uncond", "cond")):
        for step, (a, b) in enumerate(zip(alone, conditional(order), strict=True)):
            assert torch.equal(a, b), (
                f"step {step}: `cond` differs by {float((a - b).abs().max()):.2g} when {' then '.join(order)} are "
                "evaluated; keep state apart by call.branch"
            )


@_of_wraps
def check_wrap_ignores_the_batch(subject: Subject, hook: str) -> None:
    """A sample in a batch of two is the sample alone, within `batch_tolerance`."""
    tolerance = subject.cls.batch_tolerance
    together = _wrapped(subject, hook, (3, 4)).generate((3, 4)).x0
    alone = torch.cat([_wrapped(subject, hook, (s,)).generate((s,)).x0 for s in (3, 4)])
    difference = float((together - alone).abs().max() / alone.abs().max())
    assert difference <= tolerance, f"a sample alone differs by {difference:.2g}, more than batch_tolerance {tolerance}"


@_of_wraps
def check_wrap_undo_restores(subject: Subject, hook: str) -> None:
    """After undo every forward, module and weight is what it was, bit for bit."""
    if "weights" in subject.plugin.effects:
        return
    wrapped = _wrapped(subject, hook)
    plain = _tiny(subject).copy()
    tensors, _ = _state(plain.module)
    if wrapped.wrap is None:
        return
    # Compare with the state before the hook was called: it may have prepared things already.
    tiny = _tiny(subject).copy()
    _, structure = _state(tiny.module)
    wrap = tiny.wrap(subject.manager(hook), hook)
    assert wrap is not None, "it returned a wrap, and then None for the same network"
    tiny.generate((0,), wrap)
    if wrap.undo:
        wrap.undo()
    after, now = _state(tiny.module)
    changed = sorted(k for k in structure.keys() | now.keys() if structure.get(k) != now.get(k))
    assert not changed, f"undo does not restore the module or forward of {changed[0] or 'the network itself'}"
    assert tensors.keys() == after.keys(), f"undo leaves other tensors: {sorted(tensors.keys() ^ after.keys())[:3]}"
    wrong = [k for k in tensors if not torch.equal(tensors[k], after[k]) or tensors[k].dtype != after[k].dtype]
    assert not wrong, f"undo does not restore {wrong[0]}; keep a copy, or declare the effect `weights`"


@_of_wraps
def check_wrap_reports(subject: Subject, hook: str) -> None:
    """The report says what was done, and why if nothing was."""
    outcome = _wrapped(subject, hook).generate((0,))
    report = outcome.report
    if report is None:
        return
    assert type(report).__name__ == "WrapReport", f"report() gave {type(report).__name__}, expected a WrapReport"
    assert isinstance(report.did, int) and report.did >= 0, f"did = {report.did!r}: expected a count"
    assert report.what, "the report has no unit: set `what`"
    assert report.did > 0 or report.reason, "it did nothing and gives no `reason`"
    # A parallelizer has nothing to do in one process; its own check runs it on two ranks.
    if hook != "parallelize" and (names := subject.cls.noop_options) and not _off(subject, names):
        assert report.did > 0, "it did nothing here, so no check says anything: declare `acting_options`"


def _off(subject: Subject, options: Mapping[str, Any]) -> bool:
    return all(getattr(subject.plugin, name) == value for name, value in options.items())


@_of_wraps
def check_wrap_lossless_claim(subject: Subject, hook: str) -> None:
    """`lossless` means bit-identical, or within 1.5 times the plain network's rounding error."""
    if not subject.plugin.lossless:
        return
    got, plain = _wrapped(subject, hook).generate((0,)).x0, _tiny(subject).generate((0,)).x0
    if torch.equal(got, plain):
        return
    exact = _tiny(subject).to(torch.float64).generate((0,)).x0
    error, baseline = float((got - exact).abs().max()), float((plain - exact).abs().max())
    assert error <= LOSSLESS_FACTOR * baseline, (
        f"it claims `lossless`, but its error against float64 is {error:.2g}; the plain network's is {baseline:.2g}"
    )


@_of_wraps
def check_wrap_off_setting_is_plain(subject: Subject, hook: str) -> None:
    """With `noop_options`, if it declares them, the result is the plain one bit for bit, and it says so."""
    options = subject.cls.noop_options
    if not options:
        return
    plugin = build(subject.cls, options, name=subject.name)
    outcome = _wrapped(subject, hook, plugin=plugin).generate((0,))
    plain = _tiny(subject).generate((0,)).x0
    text = str(Named(subject.name, options))
    assert torch.equal(outcome.x0, plain), f"{text} differs by {float((outcome.x0 - plain).abs().max()):.2g}"
    assert outcome.report is None or outcome.report.did == 0, f"{text} reports did = {outcome.report.did}"


class _RanksDiffer(Exception):
    """A rank waits for a collective that another one has finished without."""


class _Meeting:
    """Where threads that play ranks exchange tensors; it never hangs."""

    def __init__(self, size: int) -> None:
        self.left: list[Tensor | None] = [None] * size
        self._arrivals = [0] * size
        self._gone = [False] * size
        self._changed = threading.Condition()

    def wait(self, rank: int) -> None:
        """Until every rank has come as often as this one; _RanksDiffer if one never will."""
        with self._changed:
            self._arrivals[rank] += 1
            mine = self._arrivals[rank]
            self._changed.notify_all()

            def missing() -> list[bool]:
                return [gone for gone, n in zip(self._gone, self._arrivals, strict=True) if n < mine]

            self._changed.wait_for(lambda: not missing() or any(missing()))
            if missing():
                raise _RanksDiffer

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone[rank] = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _ThreadMesh(Mesh):
    """One rank of a mesh whose ranks are threads of this process: collectives without a process group."""

    meeting: _Meeting = dataclasses.field(kw_only=True, compare=False)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.meeting.left[self.rank] = x
        self.barrier()
        parts = [part.clone() for part in self.meeting.left if part is not None]
        self.barrier()
        return parts

    def barrier(self) -> None:
        self.meeting.wait(self.rank)


def _on_ranks(subject: Subject, hook: str, size: int = 2) -> list[Outcome]:
    """The outcome of each rank; ranks that wait for different collectives are an error, not a hang."""
    meeting = _Meeting(size)

    def rank(index: int) -> Outcome:
        try:
            tiny = _tiny(subject).copy()
            run = tiny.run((0, 1), world=size)
            mesh = _ThreadMesh(index, size, meeting=meeting)
            return tiny.generate((0, 1), tiny.wrap(subject.manager(hook), hook, run, mesh), run=run)
        finally:
            meeting.leave(index)

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(rank, index) for index in range(size)]
    errors = [e for r in ranks if (e := r.exception()) is not None]
    # That a rank waits in vain is only the echo of another rank's error, if there is one.
    for error in sorted(errors, key=lambda e: isinstance(e, _RanksDiffer)):
        if isinstance(error, _RanksDiffer):
            raise AssertionError("the ranks wait for different collectives") from error
        raise error
    return [r.result() for r in ranks]


@_of("parallelize")
def check_parallelize_two_ranks(subject: Subject) -> None:
    """Two ranks agree bit for bit; a lossless plugin gives what one process gives, and any says what it did."""
    one, two = _on_ranks(subject, "parallelize")
    assert torch.equal(one.x0, two.x0), f"the ranks differ by {float((one.x0 - two.x0).abs().max()):.2g}"
    for outcome in (one, two):
        assert outcome.report is None or outcome.report.did > 0 or outcome.report.reason, "it gives no `reason`"
    # One process may send its branches as one batch or apart; both are plain.
    plain = [_tiny(subject).generate((0, 1), batched=batched).x0 for batched in (True, False)]
    assert one.x0.shape == plain[0].shape and one.x0.dtype is plain[0].dtype, "shape or dtype is not kept"
    assert one.x0.isfinite().all(), "x0 is not finite"
    if not subject.plugin.lossless or any(torch.equal(one.x0, p) for p in plain):
        return
    exact = _tiny(subject).to(torch.float64).generate((0, 1)).x0
    error, baseline = (float((x - exact).abs().max()) for x in (one.x0, plain[0]))
    assert error <= LOSSLESS_FACTOR * baseline, (
        f"it claims `lossless`, but its error against float64 is {error:.2g}; one process's is {baseline:.2g}"
    )
