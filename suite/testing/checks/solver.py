"""Checks of the hook `solver`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.diffusion.noise import VE, Cosine, Flow, Masked, NoiseSchedule, VPLinear
from suite.diffusion.noise import Uniform as UniformNoise
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import AdaptiveSolver, Denoise, Solver
from suite.errors import ConfigError
from suite.testing.checks.subject import DISCRETE, ENDS, Subject, of
from suite.testing.oracles import Mixture, PointMass, Tokens, a_run, drive, moments, observed_order

ORDER_TOLERANCE = 0.15


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


@of("solver")
def check_solver_facts_are_effects(subject: Subject) -> None:
    """What the solver is must be among the plugin's effects, where rules see it."""
    for case in _cases(subject):
        missing = sorted(case.solver.facts.words - subject.plugin.effects)
        assert not missing, f"its solver is {', '.join(missing)}; add to `effects`"


@of("solver")
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


@of("solver")
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


@of("solver")
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


@of("solver")
def check_solver_same_seed_same_output(subject: Subject) -> None:
    """The same solver object, run twice, gives the same numbers."""
    for case in _cases(subject):
        assert torch.equal(case.sample((0, 1)), case.sample((0, 1))), f"{case.noise.family}: two runs differ"


@of("solver")
def check_solver_ignores_the_batch(subject: Subject) -> None:
    """A sample in a batch is the sample alone."""
    for case in _cases(subject):
        together = case.sample((4, 5, 6))
        alone = torch.cat([case.sample((seed,)) for seed in (4, 5, 6)])
        # Not bit for bit: vectorised functions round the tail of an array differently.
        difference = float((together - alone).abs().max())
        assert difference <= 1e-4, f"{case.noise.family}: a sample alone differs by {difference:.2g}"


@of("solver")
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


@of("solver")
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
