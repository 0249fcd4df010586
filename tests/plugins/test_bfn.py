"""BFN-Solver: a Bayesian flow network of real values is a noise family, and its sampler a solver that is here."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from suite.diffusion.noise import NoiseSchedule, as_time
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Solver
from suite.plugins.solvers.ancestral import AncestralSolver
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.plugins.solvers.sde_dpmpp import SDEDPMppSolver
from suite.testing import Gaussian, Mixture, observed_order

SIGMA_1 = 0.02


@dataclass(frozen=True)
class BFN(NoiseSchedule):
    """Graves 2023 (2308.07037), section 4: the mean of the belief is gamma x0 + sqrt(gamma (1 - gamma)) eps.

    gamma = 1 - sigma_1^(2 u) with u = 1 - t, as their time runs towards the data.
    """

    family: ClassVar[str] = "bfn"

    def gamma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(2 * (1 - as_time(t)) * torch.log(as_time(SIGMA_1)))

    def alpha(self, t: Tensor | float) -> Tensor:
        return self.gamma(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        gamma = self.gamma(t)
        return (gamma * (1 - gamma)).sqrt()


def test_the_samplers_update_of_the_belief_is_the_ancestral_step() -> None:
    # Theirs: y from N(x0, 1 / a), then mean <- (rho mean + a y) / (rho + a), rho = 1 / (1 - gamma).
    noise, rng = BFN(), SampleRng((0, 1, 2))
    denoise = Mixture.two().denoiser(noise)
    mean = torch.tensor([[-0.2], [0.3], [0.5]], dtype=torch.float64)
    for t, s in ((0.9, 0.8), (0.5, 0.3), (0.2, 0.05)):
        t, s = as_time(t), as_time(s)
        before, after = (1 / (1 - noise.gamma(u)) for u in (t, s))
        accuracy, z = after - before, rng.normal_like(mean)
        heard = denoise(mean, t) + z / accuracy.sqrt()
        expected = (before * mean + accuracy * heard) / after

        class Again(SampleRng):
            def normal(self, shape: object, like: Tensor | None = None, z: Tensor = z) -> Tensor:
                return z

        got, _ = AncestralSolver(noise, "fixed-small").step(denoise, mean, t, s, None, Again((0, 1, 2)))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [DPMpp2MSolver, lambda n: SDEDPMppSolver(n, 2)], ids=["ode", "sde"])
def test_the_second_order_solvers_keep_their_order(solver: type[Solver]) -> None:
    assert observed_order(solver, BFN(), (80, 160, 320), Gaussian()) == pytest.approx(2, abs=0.1)
