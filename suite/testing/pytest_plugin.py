"""Fixtures for plugin authors; pytest loads this module wherever the suite is installed, so it stays light."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from suite.network import Network
    from suite.testing.oracles import Gaussian, Mixture, PointMass
    from suite.testing.tiny import Tiny


@pytest.fixture
def tiny() -> Tiny:
    """A random PixArt transformer with everything that is needed to generate from it."""
    from suite.testing.tiny import Tiny

    return Tiny.build()


@pytest.fixture
def tiny_network(tiny: Tiny) -> Network:
    """The network of `tiny`, as the hooks receive it."""
    return tiny.network


@pytest.fixture
def oracle_gaussian() -> Gaussian:
    """Gaussian data, for which every denoiser output and the probability flow are known in closed form."""
    from suite.testing.oracles import Gaussian

    return Gaussian(mean=0.7, variance=0.25)


@pytest.fixture
def oracle_mixture() -> Mixture:
    """Two Gaussians: a denoiser that is not affine in x."""
    from suite.testing.oracles import Mixture

    return Mixture.two()


@pytest.fixture
def oracle_point() -> PointMass:
    """All data at one point: the denoiser is constant, and one step of any solver is exact."""
    from suite.testing.oracles import PointMass

    return PointMass(0.7)
