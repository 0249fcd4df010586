"""An engine under several threads, and after errors: every run is as if it were the only one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.engine.engine import Engine
from suite.errors import ConfigError, PluginError, SuiteError
from suite.hookspecs import hookimpl
from suite.host.discovery import Entry, installed
from suite.host.manager import implemented_hooks
from suite.network.patch import Patches
from suite.plugin import Plugin, build
from suite.recipe import Named
from suite.testing.engine import rows_of, tiny_engine, tiny_plan
from suite.wrap import Wrap, WrapReport

PROMPTS = ("a red apple", "a smiling cat")


def every(*hooks: str) -> Iterator[Any]:
    """(hook, plugin as a recipe names it, the kit's network for it) of the first-party plugins of these hooks."""
    for name, entry in installed().items():
        cls = entry.load()
        for hook in set(hooks) & set(implemented_hooks(cls)):
            try:
                effects = build(cls, cls.acting_options, name=name).effects
            except ConfigError:  # needs a library that is not here
                continue
            network = "tokens" if "needs-tokens" in effects else cls.kit_network
            yield pytest.param(hook, str(Named(name, dict(cls.acting_options))), network, id=f"{hook}-{name}")


def opened(network: str, hook: str, plugin: str) -> Engine:
    recipe: Any = {hook: [plugin]}
    return tiny_engine(network, **recipe)


EVERY = list(every("cache", "compress", "parallelize"))


def made(engine: Engine, index: int) -> Tensor:
    return rows_of(engine.generate(PROMPTS[index], seed=index, num=2).artifacts)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads that take turns as often as Python can, so that runs would mix."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised; all begin at once."""
    out: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        barrier.wait()
        try:
            out[index] = jobs[index]()
        except BaseException as error:
            out[index] = error

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out


@pytest.mark.parametrize(("hook", "plugin", "network"), EVERY)
def test_two_threads_get_what_serial_runs_get(hurried: None, hook: str, plugin: str, network: str) -> None:
    with opened(network, hook, plugin) as engine:
        serial = [made(engine, index) for index in range(len(PROMPTS))]
        # Whoever keeps runs for later has kept those; what is compared then is the second run with the third.
        serial = [made(engine, index) for index in range(len(PROMPTS))]
        got = in_threads([lambda index=index: made(engine, index) for index in range(len(PROMPTS))])
        for alone, together in zip(serial, got, strict=True):
            assert isinstance(together, Tensor), together
            assert torch.equal(alone, together)
        after = made(engine, 0)
    assert torch.equal(after, serial[0])


def test_engines_under_other_plans_share_the_turn(hurried: None) -> None:
    with tiny_engine(cache=["fora:interval=2"]) as engine:
        other = engine.under(tiny_plan(cache=["first-block:threshold=0.3"]))
        serial = [made(engine, 0), made(other, 1)]
        for _ in range(3):
            got = in_threads([lambda: made(engine, 0), lambda: made(other, 1)])
            assert all(torch.equal(a, b) for a, b in zip(serial, got, strict=True))
        assert engine._stamp != other._stamp
        assert engine._run(engine.request(("x",)), (0,)).stamp != other._run(other.request(("x",)), (0,)).stamp
        engine.close()
        with pytest.raises(ConfigError, match="closed"):
            other.generate("a red apple")


def test_a_run_within_a_run_is_refused_and_does_not_wait_for_itself() -> None:
    with tiny_engine() as engine:
        before = made(engine, 0)
        with pytest.raises(ConfigError, match="from within its own run"):
            engine.generate("a red apple", on_step=lambda step: engine.generate("a cat"))
        with pytest.raises(ConfigError, match="from within its own run"):
            engine.generate("a red apple", on_step=lambda step: engine.close())
        assert torch.equal(made(engine, 0), before)


def test_a_closed_engine_says_so() -> None:
    engine = tiny_engine(cache=["fora"], compress=["int8"])
    engine.generate("a red apple")
    engine.close()
    engine.close()
    for use in (
        lambda: engine.generate("a red apple"),
        lambda: next(engine.stream(["a red apple"], [0])),
        lambda: engine.problem(["a red apple"], [0], None),  # pyright: ignore[reportArgumentType]
        lambda: engine.under(engine.plan),
    ):
        with pytest.raises(ConfigError, match="closed; load it again"):
            use()
    with tiny_engine() as another:
        pass
    with pytest.raises(ConfigError, match="closed"):
        another.generate("a red apple")


def test_close_waits_for_the_run_at_hand() -> None:
    engine = tiny_engine(compress=["int8"])
    expected = made(engine, 0)
    running, go_on = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        running.set()
        go_on.wait(30)

    out: list[Any] = []
    run = threading.Thread(
        target=lambda: out.append(engine.generate(PROMPTS[0], seed=0, num=2, on_step=hold)), daemon=True
    )
    run.start()
    assert running.wait(30)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive() and not engine._turn.closed
    go_on.set()
    run.join(30)
    closing.join(30)
    assert torch.equal(rows_of(out[0].artifacts), expected) and engine._turn.closed


WHERE = ("hook", "half-way", "network", "run", "run-then-undo", "undo", "report", "leaves", "no-report", "none")


@dataclass(frozen=True)
class Breaks(Plugin):
    """Fails where it is told to, after it has replaced every forward."""

    where: str = "none"
    how: str = "error"

    effects = frozenset({"step-reuse"})

    @hookimpl
    def cache(self, network: Any, run: Any) -> Wrap:
        patches = Patches()
        seen = 0

        def fail(*where: str) -> None:
            if self.where in where:
                raise KeyboardInterrupt if self.how == "stop" else RuntimeError(f"broken in {self.where}")

        def half(forward: Any) -> Any:
            def twice(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen > 40:
                    fail("run", "run-then-undo")
                return forward(*args, **kwargs)

            return twice

        def install(module: Any) -> Any:
            for part in [block.module for block in network.blocks("block")]:
                patches.replace(part, half)
                fail("network")
            return module

        def undo() -> None:
            fail("undo", "run-then-undo")
            if self.where != "leaves":
                patches.undo()

        def report() -> Any:
            fail("report")
            return "nothing" if self.where == "no-report" else WrapReport(seen, "calls seen")

        fail("hook")
        if self.where == "half-way":
            install(network.module)
            fail("half-way")
        return Wrap(report=report, network=install, undo=undo)


EXTRA = {"breaks": Entry("breaks", f"{__name__}:Breaks", "tests", "1")}


@pytest.mark.parametrize("how", ["error", "stop"])
@pytest.mark.parametrize("where", WHERE[:-1])
def test_after_an_error_the_engine_is_as_good_as_a_fresh_one(where: str, how: str) -> None:
    with tiny_engine(cache=["fora:interval=2"], compress=["int8"]) as engine:
        expected = made(engine, 0)
        report = engine.generate(PROMPTS[0]).report.plugins
        broken = engine.under(
            tiny_plan(cache=["fora:interval=2", f"breaks:where={where},how={how}"], compress=["int8"], extra=EXTRA)
        )
        stops = how == "stop" and where not in ("leaves", "no-report")
        with pytest.raises(KeyboardInterrupt if stops else PluginError) as raised:
            broken.generate("a smiling cat", seed=3)
        if not stops:
            assert "breaks" in str(raised.value)
            if where == "run-then-undo":
                assert "broken in" in str(raised.value)
        assert not [name for name, m in engine.network.module.named_modules() if "forward" in m.__dict__]
        assert torch.equal(made(engine, 0), expected)
        assert engine.generate(PROMPTS[0]).report.plugins == report
        whole = engine.under(tiny_plan(cache=["fora:interval=2", "breaks"], compress=["int8"], extra=EXTRA))
        assert torch.equal(made(whole, 0), expected)


@pytest.mark.parametrize(("hook", "plugin", "network"), EVERY)
def test_a_run_that_is_stopped_in_the_middle_leaves_no_trace(hook: str, plugin: str, network: str) -> None:
    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 4:
            raise Stop("enough")

    with opened(network, hook, plugin) as engine:
        made(engine, 0)
        expected, report = made(engine, 0), engine.generate(PROMPTS[0], num=2).report.plugins
        for error in (Stop, KeyboardInterrupt):
            try:
                engine.generate(PROMPTS[1], seed=1, on_step=stop if error is Stop else _interrupt)
            except error:
                pass
            except SuiteError as other:
                pytest.fail(f"told as {other}")
        assert torch.equal(made(engine, 0), expected)
        assert engine.generate(PROMPTS[0], num=2).report.plugins == report


def _interrupt(step: int) -> None:
    if step == 6:
        raise KeyboardInterrupt


def test_out_of_memory_below_a_patched_block_is_nobodys_fault() -> None:
    with tiny_engine(cache=["fora:interval=2"]) as engine:
        part: Any = engine.network.blocks("mlp")[0].module
        real = part.forward

        def full(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        part.forward = full
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate("a red apple")
        assert part.__dict__["forward"] is full
        part.forward = real
        assert engine.generate("a red apple").artifacts


def test_records_are_made_with_the_noise_and_can_be_differentiated() -> None:
    with tiny_engine(cache=["forecast"]) as engine:
        records = engine._record(("one", "two"))
    assert records and not any(r.x.is_inference() for r in records)
    assert not any(v.is_inference() for r in records for v in r.cond.values())
