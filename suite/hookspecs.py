"""The five hooks of the suite.

A plugin is a frozen dataclass of options whose methods, marked with `@hookimpl`, implement one or more of
these hooks. Installing a plugin makes it listable; naming it in a recipe makes it act.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

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

PROJECT = "suite"
HOOKSPEC_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def schedule(noise: NoiseSchedule, run: Run) -> Schedule | None:
    """Choose the times at which the sampler stops.

    Called once a run, before the solver. At most one active plugin may implement it; two are a
    configuration error that names both.

    Args:
        noise: the noise schedule that the checkpoint was trained with (alpha, sigma, log-SNR over t in [0, 1]).
        run: frozen facts of the run: modality, device, steps, batch, guidance.

    Returns:
        A `Schedule`, or None to leave the choice to the modality's default.
    """


@hookspec(firstresult=True)
def solver(noise: NoiseSchedule, run: Run) -> Solver | None:
    """Choose how to step from one time to the next.

    Called once a run. At most one active plugin may implement it; two are a configuration error that
    names both.

    Args:
        noise: the noise schedule in force: the checkpoint's, unless the `schedule` plugin replaced it.
        run: frozen facts of the run.

    Returns:
        A `Solver`: a value with `init` and `step`; its state is passed in and out, never kept inside.
    """


@hookspec
def compress(network: Network, calibration: Calibration, run: Run, companions: Companions) -> Wrap | None:
    """Make the network smaller or cheaper.

    Called once a load, before `parallelize` and `cache`. All active plugins are asked; the host applies
    their wraps in the order of the recipe.

    Args:
        network: the module with its facts (blocks, linear layers, latent layout).
        calibration: yields recorded network inputs on request; costs nothing if not asked.
        run: frozen facts of the run.
        companions: opens other models that fit this one, by name or folder, for a wrap's `experts`.

    Returns:
        A `Wrap`, or None if there is nothing to do for this network.
    """


@hookspec
def parallelize(network: Network, mesh: Mesh, run: Run) -> Wrap | None:
    """Spread one generation over the ranks of a mesh.

    Called once a load, after `compress`. All active plugins are asked; the host applies their wraps in
    the order of the recipe.

    Args:
        network: the module with its facts, already compressed.
        mesh: rank, size and collectives of the process group; size 1 without one.
        run: frozen facts of the run.

    Returns:
        A `Wrap`, or None if there is nothing to do.
    """


@hookspec
def cache(network: Network, noise: NoiseSchedule, run: Run) -> Wrap | None:
    """Reuse what barely changes between evaluations.

    Called once a run, after `parallelize`, so that every run starts with fresh state. All active plugins
    are asked; the host applies their wraps in the order of the recipe.

    Args:
        network: the module with its facts, as `compress` and `parallelize` left it.
        noise: the noise schedule in force, for caches that turn x0 into another prediction.
        run: frozen facts of the run.

    Returns:
        A `Wrap` made for this run alone, or None if the network has nothing to cache.
    """


#: In the order in which the host applies them.
HOOKS: tuple[str, ...] = ("schedule", "solver", "compress", "parallelize", "cache")
#: Hooks that at most one active plugin may implement.
SINGLE: frozenset[str] = frozenset({"schedule", "solver"})
