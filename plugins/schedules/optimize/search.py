"""AutoDiffusion's search: generations of grids, bred from those whose samples are best."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suite.errors import ConfigError
from suite.fitting.grid_fit import Fitted, GridMethod, GridProblem
from suite.plugins.schedules.optimize._curves import check_levels, nodes

Genes = tuple[int, ...]


def evolve(
    fitness: Callable[[Genes], float],
    pool: int,
    size: int,
    founders: Sequence[Genes] = (),
    population: int = 16,
    generations: int = 8,
    seed: int = 0,
) -> tuple[Genes, float, list[float]]:
    """The fittest subset of `size` out of `pool` places (sorted), its fitness, and the best of each generation.

    The better half of a generation lives on and breeds: a child takes each place of two parents with equal chance
    (crossover), or one parent with one or two places moved, most often by little (mutation). No subset is judged
    twice, and the best is never lost.

    Args:
        fitness: smaller is better.
        founders: subsets that are in the first generation.

    Raises:
        ConfigError: the pool is smaller than the subset.
    """
    if not 0 <= size <= pool:
        raise ConfigError(f"{size} stops do not fit between {pool} levels; take more levels or fewer steps")
    chance = random.Random(seed)
    judged: dict[Genes, float] = {}

    def judge(genes: Genes) -> None:
        if genes not in judged:
            judged[genes] = fitness(genes)

    def subset(places: Sequence[int]) -> Genes:
        """Exactly `size` of the places; missing ones are drawn."""
        chosen = set(places)
        while len(chosen) > size:
            chosen.remove(chance.choice(sorted(chosen)))
        while len(chosen) < size:
            chosen.add(chance.randrange(pool))
        return tuple(sorted(chosen))

    def cross(one: Genes, two: Genes) -> Genes:
        return subset([place for place in {*one, *two} if chance.random() < 0.5])

    def mutate(genes: Genes) -> Genes:
        moved = list(genes)
        for _ in range(chance.choice((1, 1, 2))):
            k = chance.randrange(size)
            reach = 2 if chance.random() < 0.7 else pool
            moved[k] = min(pool - 1, max(0, moved[k] + chance.randint(-reach, reach)))
        return subset(moved)

    for genes in founders:
        judge(subset(genes))
    tries = 0
    while len(judged) < population and tries < 50 * population:  # a small pool has fewer subsets than that
        judge(subset(()))
        tries += 1
    history = [min(judged.values())]
    for _ in range(generations):
        parents = sorted(judged, key=lambda genes: judged[genes])[: max(2, population // 2)]
        children: set[Genes] = set()
        tries = 0
        while size and len(children) < population and tries < 50 * population:
            one, two = chance.choice(parents), chance.choice(parents)
            child = mutate(one) if chance.random() < 0.5 else cross(one, two)
            tries += 1
            if child not in judged:
                children.add(child)
        for child in sorted(children):
            judge(child)
        history.append(min(judged.values()))
    best = min(judged, key=lambda genes: (judged[genes], genes))
    return best, judged[best], history


@dataclass(frozen=True)
class Search(GridMethod):
    """Li 2023, over times alone: what is bred is the grid, and the fitness is the distance to the reference.

    The paper's fitness is a Frechet distance over thousands of samples. Here it is the error of this solver's
    samples against those of many steps from the same seeds, which a dozen samples decide; so the solver must
    not draw noise. The first generation holds the recipe's own grid, on the nearest places. The method is blind
    to why a grid is good, and so also fits what theory leaves out: the solver's order, its first steps,
    guidance.

    Args:
        levels: places for the inner stops, even in log-SNR.
        high, low: sigma / alpha between which they lie.
        population, generations: population x (generations + 1) grids are tried at most.
        seed: of the search.
    """

    levels: int = 64
    high: float = 100.0
    low: float = 0.01
    population: int = 16
    generations: int = 8
    seed: int = 0

    summary = "evolutionary search for the grid with the smallest error against many steps"
    paper = "AutoDiffusion (2309.10438), section 3.3"
    deterministic = True

    def __post_init__(self) -> None:
        check_levels("search", self.levels, self.high, self.low)
        for name, value in (("population", self.population), ("generations", self.generations)):
            if not 2 <= value <= 10_000:
                raise ConfigError(f"search: {name} = {value}: expected 2 to 10000")

    def fit(self, problem: GridProblem) -> Fitted:
        import torch

        if problem.noise.discrete:
            raise ConfigError("search compares samples with a reference; tokens are drawn, so use --method dp")
        places, inner = nodes(problem.noise, self.levels + 1, self.high, self.low)[1:], problem.steps - 1

        def grid(genes: Genes) -> torch.Tensor:
            stops = places[list(genes)]
            return torch.cat([stops.new_ones(1), stops, stops.new_zeros(1)])

        even = tuple(round(k * (self.levels - 1) / max(1, inner - 1)) for k in range(inner))
        lam = problem.noise.log_snr(places)

        def nearest(times: torch.Tensor) -> Genes:
            return tuple(int((lam - one).abs().argmin()) for one in problem.noise.log_snr(times[1:-1]))

        in_time = nearest(torch.linspace(1, 0, problem.steps + 1, dtype=torch.float64))
        founders = (even, in_time, nearest(problem.own.reshape(problem.steps + 1, -1)[:, 0]))
        best, error, history = evolve(
            lambda genes: problem.error(grid(genes)),
            self.levels, inner, founders, self.population, self.generations, self.seed,
        )  # fmt: skip
        return Fitted(grid(best).tolist(), error, {"history": history})
