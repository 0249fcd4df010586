"""Checks of the hooks that return a `Wrap`: compress, parallelize, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from suite.call import Call
from suite.plugin import build
from suite.recipe import Named
from suite.testing.checks.subject import LOSSLESS_FACTOR, Subject, of_wraps
from suite.testing.tiny import Outcome, Tiny, TinyTokens
from suite.wrap import Wrap


@cache
def _built_once(network: str, tokens: bool) -> Tiny:
    return TinyTokens.build() if tokens else Tiny.build(network=network)


def tiny_of(subject: Subject) -> Tiny:
    """The network that a plugin is checked on: over tokens if it needs them, else of the kind that it asks for."""
    return _built_once(subject.cls.kit_network, "needs-tokens" in subject.plugin.effects)


@dataclass
class _Wrapped:
    """A wrap on a copy of the tiny network."""

    tiny: Tiny
    wrap: Wrap | None

    def generate(self, seeds: tuple[int, ...], batched: bool = True) -> Outcome:
        return self.tiny.generate(seeds, self.wrap, batched=batched)


def under(subject: Subject, hook: str, seeds: tuple[int, ...] = (0,), plugin: Any = None) -> _Wrapped:
    tiny = tiny_of(subject).copy()
    return _Wrapped(tiny, tiny.wrap(subject.manager(hook, plugin), hook, tiny.run(seeds)))


def _state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of all tensors, and which objects and replaced forwards stand where."""
    tensors = {k: v.clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}
    structure = {
        name: (id(part), id(part.__dict__.get("forward")), tuple(part._forward_hooks), tuple(part._forward_pre_hooks))
        for name, part in module.named_modules()
    }
    return tensors, structure


@of_wraps
def check_wrap_keeps_shape_and_dtype(subject: Subject, hook: str) -> None:
    """The wrapped network and the whole run give the plain one's shape and dtype."""
    wrapped = under(subject, hook, (0, 1))
    before = wrapped.tiny.once(wrapped.tiny.module, (0, 1))
    module = wrapped.tiny.module
    if wrapped.wrap and wrapped.wrap.network:
        module = wrapped.wrap.network(module)
        assert isinstance(module, nn.Module), f"its network part returned {type(module).__name__}"
    after = wrapped.tiny.once(module, (0, 1))
    assert after.shape == before.shape, f"the network gives {tuple(after.shape)}, expected {tuple(before.shape)}"
    assert after.dtype is before.dtype, f"the network gives {after.dtype}, expected {before.dtype}"
    out = under(subject, hook, (0, 1)).generate((0, 1)).x0
    prior = wrapped.tiny.prior((0, 1))
    assert out.shape == prior.shape and out.dtype is prior.dtype, f"x0 is {tuple(out.shape)} {out.dtype}"
    assert out.isfinite().all(), "x0 is not finite"


@of_wraps
def check_wrap_same_seed_same_output(subject: Subject, hook: str) -> None:
    """Two networks, two wraps, one seed: one result."""
    one, two = (under(subject, hook).generate((0,)).x0 for _ in range(2))
    assert torch.equal(one, two), f"equal seeds differ by {float((one - two).abs().max()):.2g}"


@of_wraps
def check_wrap_two_runs_in_a_row(subject: Subject, hook: str) -> None:
    """A second run on the same network, with a fresh wrap, gives the first one's result: no state is left."""
    tiny, manager = tiny_of(subject).copy(), subject.manager(hook)
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


@of_wraps
def check_wrap_keeps_branches_apart(subject: Subject, hook: str) -> None:
    """What `cond` gives does not depend on whether `uncond` is evaluated between, before, or not at all."""

    def conditional(order: tuple[str, ...]) -> list[Tensor]:
        wrapped = under(subject, hook)
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
                "evaluated; keep state apart by call.key"
            )


@of_wraps
def check_wrap_treats_branches_alike_together_and_apart(subject: Subject, hook: str) -> None:
    """With guidance in an interval, branches that travel apart give what the batched pair gives, within rounding."""
    wrapped, seeds = under(subject, hook), (0,)
    run = wrapped.tiny.run(seeds, guidance_interval=(0.3, 0.7))
    one, two = (
        (again := under(subject, hook)).tiny.generate(seeds, again.wrap, batched=batched, run=run).x0
        for batched in (True, False)
    )
    if not one.is_floating_point():
        return  # tokens are drawn: one bit may tip one
    difference = float((one - two).abs().max() / one.abs().max())
    assert difference <= subject.cls.batch_tolerance, (
        f"guidance in an interval: branches sent apart differ from the batched pair by {difference:.2g}; keep state "
        "apart by call.key, which says which branches were evaluated together"
    )


@of_wraps
def check_wrap_ignores_the_batch(subject: Subject, hook: str) -> None:
    """A sample in a batch of two is the sample alone, within `batch_tolerance`."""
    tolerance = subject.cls.batch_tolerance
    together = under(subject, hook, (3, 4)).generate((3, 4)).x0
    alone = torch.cat([under(subject, hook, (s,)).generate((s,)).x0 for s in (3, 4)])
    difference = float((together - alone).abs().max() / alone.abs().max())
    assert difference <= tolerance, f"a sample alone differs by {difference:.2g}, more than batch_tolerance {tolerance}"


@of_wraps
def check_wrap_undo_restores(subject: Subject, hook: str) -> None:
    """After undo every forward, module and weight is what it was, bit for bit."""
    if "weights" in subject.plugin.effects:
        return
    wrapped = under(subject, hook)
    plain = tiny_of(subject).copy()
    tensors, _ = _state(plain.module)
    if wrapped.wrap is None:
        return
    # Compare with the state before the hook was called: it may have prepared things already.
    tiny = tiny_of(subject).copy()
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


@of_wraps
def check_wrap_reports(subject: Subject, hook: str) -> None:
    """The report says what was done, and why if nothing was."""
    outcome = under(subject, hook).generate((0,))
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


@of_wraps
def check_wrap_lossless_claim(subject: Subject, hook: str) -> None:
    """`lossless` means bit-identical, or within 1.5 times the plain network's rounding error."""
    if not subject.plugin.lossless:
        return
    got, plain = under(subject, hook).generate((0,)).x0, tiny_of(subject).generate((0,)).x0
    if torch.equal(got, plain):
        return
    exact = tiny_of(subject).to(torch.float64).generate((0,)).x0
    error, baseline = float((got - exact).abs().max()), float((plain - exact).abs().max())
    assert error <= LOSSLESS_FACTOR * baseline, (
        f"it claims `lossless`, but its error against float64 is {error:.2g}; the plain network's is {baseline:.2g}"
    )


@of_wraps
def check_wrap_off_setting_is_plain(subject: Subject, hook: str) -> None:
    """With `noop_options`, if it declares them, the result is the plain one bit for bit, and it says so."""
    options = subject.cls.noop_options
    if not options:
        return
    plugin = build(subject.cls, options, name=subject.name)
    outcome = under(subject, hook, plugin=plugin).generate((0,))
    plain = tiny_of(subject).generate((0,)).x0
    text = str(Named(subject.name, options))
    assert torch.equal(outcome.x0, plain), f"{text} differs by {float((outcome.x0 - plain).abs().max()):.2g}"
    assert outcome.report is None or outcome.report.did == 0, f"{text} reports did = {outcome.report.did}"
