"""Critically-damped Langevin diffusion: its kernel, SSCS and gDDIM, on a toy with position and velocity.

The host's `NoiseSchedule` has one alpha and one sigma a time; here they are 2 x 2 matrices. So these are tests of
the methods' mathematics, and what a plugin would need is an augmented state in the contract.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

MASS, BETA, SPREAD = 0.25, 4.0, 0.04
GAMMA = 2 * math.sqrt(MASS)
EYE = torch.eye(2, dtype=torch.float64)
EQUILIBRIUM = torch.diag(torch.tensor([1.0, MASS], dtype=torch.float64))
START = torch.diag(torch.tensor([0.0, SPREAD * MASS], dtype=torch.float64))
NOISE = torch.diag(torch.tensor([0.0, 2 * GAMMA * BETA], dtype=torch.float64))


def drift(gamma: float = GAMMA) -> Tensor:
    """F of d(x, v) = F (x, v) dt + G dw (Dockhorn 2022, eq. 5)."""
    return BETA * torch.tensor([[0.0, 1 / MASS], [-1.0, -gamma / MASS]], dtype=torch.float64)


def transition(time: float) -> Tensor:
    """exp(F t) in closed form: the double eigenvalue -r makes (F + r) nilpotent."""
    r = BETA * GAMMA / (2 * MASS)
    return math.exp(-r * time) * (EYE + time * (drift() + r * EYE))


def covariance(time: float) -> Tensor:
    """Of (x, v) given x0; the equilibrium is forgotten at the rate of the mean."""
    e = transition(time)
    return e @ (START - EQUILIBRIUM) @ e.T + EQUILIBRIUM


def integrate(slope, value: Tensor, first: float, last: float, steps: int = 400) -> Tensor:
    """RK4."""
    h = (last - first) / steps
    for k in range(steps):
        t = first + k * h
        a = slope(value, t)
        b = slope(value + h / 2 * a, t + h / 2)
        c = slope(value + h / 2 * b, t + h / 2)
        d = slope(value + h * c, t + h)
        value = value + h / 6 * (a + 2 * b + 2 * c + d)
    return value


@pytest.mark.parametrize("time", [0.05, 0.3, 1.0])
def test_the_kernel_in_closed_form(time: float) -> None:
    torch.testing.assert_close(transition(time), torch.matrix_exp(drift() * time), rtol=1e-10, atol=1e-12)
    by_ode = integrate(lambda s, t: drift() @ s + s @ drift().T + NOISE, START, 0.0, time)
    torch.testing.assert_close(covariance(time), by_ode, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_damping_is_critical_for_one_friction_only(factor: float) -> None:
    trace, determinant = (f(drift(factor * GAMMA)) for f in (torch.trace, torch.linalg.det))
    discriminant = float(trace**2 - 4 * determinant)
    assert (abs(discriminant) < 1e-9) == (factor == 1.0)


def sscs(mean: Tensor, spread: Tensor, step: float, gain: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """One symmetric splitting step down in time, as a map of mean and covariance (Dockhorn 2022, algorithm 1).

    Half a step of the linear part with its noise, exactly; a full Euler step of 2 Gamma beta (score + v / M), which is
    `gain` applied to (x, v); and half a step of the linear part again. Back in time x is coupled with the other sign.
    """
    back = drift() * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    half = torch.matrix_exp(back * step / 2)
    fresh = EQUILIBRIUM - half @ EQUILIBRIUM @ half.T
    kick = torch.matrix_exp(step * gain) if exact else EYE + step * gain
    for matrix, noise in ((half, fresh), (kick, 0 * fresh), (half, fresh)):
        mean, spread = matrix @ mean, matrix @ spread @ matrix.T + noise
    return mean, spread


def test_sscs_leaves_the_equilibrium_alone() -> None:
    # With the equilibrium's score -v / M there is nothing to kick, and any step is exact.
    for step in (0.01, 0.3, 2.0):
        mean, spread = sscs(torch.zeros(2, dtype=torch.float64), EQUILIBRIUM, step, 0 * EYE)
        torch.testing.assert_close(spread, EQUILIBRIUM, rtol=0, atol=1e-12)
        assert not mean.any()


@pytest.mark.parametrize(("exact", "order"), [(False, 1), (True, 2)])
def test_the_splitting_of_sscs_is_of_second_order_and_its_euler_kick_of_first(exact: bool, order: int) -> None:
    # Gaussian data: the law at each time is known, and so is the score's velocity part.
    data = torch.diag(torch.tensor([0.3, SPREAD * MASS], dtype=torch.float64))

    def law(time: float) -> Tensor:
        e = transition(time)
        return e @ (data - EQUILIBRIUM) @ e.T + EQUILIBRIUM

    errors, first, last = [], 0.5, 0.1
    for count in (40, 80, 160, 320):
        mean, spread = torch.zeros(2, dtype=torch.float64), law(first)
        h = (first - last) / count
        for k in range(count):
            inverse = torch.linalg.inv(law(first - (k + 0.5) * h))
            gain = torch.zeros(2, 2, dtype=torch.float64)
            gain[1] = 2 * GAMMA * BETA * (torch.tensor([0.0, 1 / MASS], dtype=torch.float64) - inverse[1])
            mean, spread = sscs(mean, spread, h, gain, exact)
        errors.append(float((spread - law(last)).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1)


def root(first: float, time: float) -> Tensor:
    """gDDIM's R(t): R R^T is the covariance, and R solves R' = (F + G G^T C^-1 / 2) R (Zhang 2022, eq. 17)."""
    start = torch.linalg.cholesky(covariance(first))
    return integrate(lambda r, t: (drift() + NOISE @ torch.linalg.inv(covariance(t)) / 2) @ r, start, first, time)


def test_gddim_is_exact_on_a_point_in_one_step() -> None:
    low, high, point = 0.05, 0.6, torch.tensor([0.7, 0.0], dtype=torch.float64)
    r_low, r_high = (root(0.05, t) if t > 0.05 else torch.linalg.cholesky(covariance(t)) for t in (low, high))
    torch.testing.assert_close(r_high @ r_high.T, covariance(high), rtol=1e-7, atol=1e-8)
    state = torch.tensor([-0.4, 0.9], dtype=torch.float64)

    def flow(u: Tensor, t: float) -> Tensor:
        score = -torch.linalg.solve(covariance(t), u - transition(t) @ point)
        return drift() @ u - NOISE @ score / 2

    exact = integrate(flow, state, high, low, 4000)
    epsilon = torch.linalg.solve(r_high, state - transition(high) @ point)
    carried = transition(low) @ torch.linalg.inv(transition(high))
    got = carried @ state + (r_low - carried @ r_high) @ epsilon
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)
    # The Cholesky factor instead, whose epsilon is not constant along the flow, misses.
    other = torch.linalg.cholesky(covariance(high))
    wrong = carried @ state + (r_low - carried @ other) @ torch.linalg.solve(other, state - transition(high) @ point)
    assert float((wrong - exact).abs().max()) > 1e-2


def test_gddim_is_ddim_where_noise_is_isotropic() -> None:
    # R = sigma: x_s = (a_s / a_t) x + (sigma_s - sigma_t a_s / a_t) eps.
    from suite.diffusion.noise import VPLinear
    from suite.plugins.solvers._exponential import noise_step_weights

    noise = VPLinear()
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (0.7, 0.4))
    carried = noise.alpha(s) / noise.alpha(t)
    assert noise_step_weights(noise, t, s) == pytest.approx(
        (float(carried), float(noise.sigma(s) - carried * noise.sigma(t))), rel=1e-12
    )
