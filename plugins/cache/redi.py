"""ReDi: after the first steps, jump to where a stored trajectory that was here went."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import PathOption, Plugin
from suite.wrap import Wrap, WrapReport, reuse

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.rng import SampleRng
    from suite.diffusion.sampler import Problem, Sampler
    from suite.plugins.cache._store import Store
    from suite.run import Run

UNIT = "steps skipped or trajectories stored (rows x steps)"


@dataclass
class _Tally:
    """What happened in one run."""

    store: Store
    rows: int = 0
    steps: int = 0
    skipped: int = 0
    stored: int = 0
    distances: list[float] = field(default_factory=list)
    why: str = ""

    def report(self) -> WrapReport:
        hits = len(self.distances)
        facts = reuse(
            hits=hits,
            misses=self.rows - hits,
            skipped_share=self.skipped / max(1, self.steps * self.rows),
            bytes_held=self.store.held(),
            skipped=self.skipped,
            stored=self.stored,
            distances=[round(d, 6) for d in self.distances],
        )
        did = self.skipped + self.stored
        return WrapReport(did, UNIT, facts, "" if did else self.why)


@dataclass(frozen=True)
class ReDi(Plugin):
    """Zhang 2023: trajectories that are near each other after k steps are near each other after v.

    The first k steps are run; if x is within `radius` of a stored x_k, sampling goes on from the x_v that belongs to
    it, which costs k + (T - v) steps; otherwise all steps are run and the pair (x_k, x_v) is stored. The error is at
    most L^(v-k) times the distance, L a step's Lipschitz constant; at distance 0 there is none, and a trajectory that
    is stored itself ends bit for bit where it ended before, if the solver draws no noise and has no history.

    Args:
        store: folder of the pairs; empty keeps them until the process ends.
        early: share of the steps that are run before the search, k = floor(early T), at least 1.
        late: share of the steps after which sampling goes on, v.
        radius: largest root mean square distance of x_k to a stored one. 0 finds only itself.
        limit_mib: most memory of the folder.

    Raises:
        ConfigError: the folder cannot be used, or one pair is larger than the limit.
    """

    store: PathOption = ""
    early: float = 0.2
    late: float = 0.6
    radius: float = 0.05
    limit_mib: float = 256.0

    summary = "after the first steps, jump along the nearest stored trajectory; needs a folder to be of use later"
    paper = "ReDi (2302.02285), algorithm 1 and theorem 1"
    effects = frozenset(
        {
            "trajectory",
            "trajectory-store",
            "needs-fixed-grid",
            "needs-deterministic-step",
            "call-count",
            "dynamic-decision",
        }
    )
    noop_options: ClassVar[dict[str, Any]] = {"early": 0.0, "late": 0.0}

    def __post_init__(self) -> None:
        if not (0 <= self.early <= self.late < 1):
            raise ConfigError(
                f"redi: early = {self.early}, late = {self.late}: expected shares of the steps with early <= late < 1"
            )
        if not self.radius >= 0:
            raise ConfigError(f"redi: radius = {self.radius}: expected a distance of 0 or more")
        if not self.limit_mib > 0:
            raise ConfigError(f"redi: limit_mib = {self.limit_mib}: expected MiB above 0")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.late == 0

    @hookimpl
    def cache(self, run: Run) -> Wrap:
        del run
        from suite.plugins.cache._store import Store

        tally = _Tally(Store.open("redi", self.store, self.limit_mib))
        return Wrap(
            report=tally.report,
            sampler=lambda inner: lambda problem: self._sample(inner, problem, tally),
            undo=tally.store.forget,
            held=tally.store.in_memory,
        )

    def _sample(self, inner: Sampler, problem: Problem, tally: _Tally) -> Tensor:
        import torch

        from suite.diffusion.sampler import some
        from suite.plugins.cache._trajectory import check_fits, stamp_of

        steps = problem.times.shape[0] - 1
        late = int(self.late * steps + 1e-9)
        early = max(1, int(self.early * steps + 1e-9))
        if late <= early or problem.times[0].max() < 1:
            tally.why = f"of {steps} steps none lies between early = {self.early:g} and late = {self.late:g}"
            return inner(problem)
        if problem.noise.discrete:
            raise ConfigError("redi compares states by their distance, which says nothing of tokens; drop --cache redi")
        check_fits("redi", problem, tally.store, 2)
        stamp = f"{stamp_of(problem)}-{early}-{late}"
        # The rest of the grid is a problem of its own, so that rows may go on from different times.
        tally.rows, tally.steps = problem.x.shape[0], steps
        begun = inner(replace(problem, times=problem.times[: early + 1]))
        found = [self._nearest(x.cpu(), stamp, tally) for x in begun]
        groups: dict[int, list[int]] = defaultdict(list)
        for row, state in enumerate(found):
            groups[early if state is None else late].append(row)
        out = torch.empty_like(problem.x)
        for at, members in sorted(groups.items()):
            part = replace(some(problem, members), times=problem.times[at:])
            part = replace(part, run=replace(part.run, steps=steps - at, run_id=f"{part.run.run_id}/{at}"))
            if at == late:
                tally.skipped += (late - early) * len(members)
                jumped = torch.stack([s for row in members if (s := found[row]) is not None])
                out[members] = inner(replace(part, x=jumped.to(problem.x)))
                continue
            start = begun[members]
            out[members] = inner(self._storing(replace(part, x=start), start, late - early, stamp, tally))
        return out

    def _storing(self, part: Problem, start: Tensor, after: int, stamp: str, tally: _Tally) -> Problem:
        from suite.plugins.cache._trajectory import Showing

        def show(k: int, x: Tensor, rng: SampleRng) -> None:
            del k, rng
            for row in range(x.shape[0]):
                key = start[row].float().cpu()
                name = hashlib.sha256(key.contiguous().numpy().tobytes()).hexdigest()[:24]
                tally.stored += tally.store.put(stamp, name, after, {"vector": key.flatten(), "state": x[row]})

        return replace(part, solver=Showing(part.solver, {after}, show))

    def _nearest(self, x: Tensor, stamp: str, tally: _Tally) -> Tensor | None:
        """x_v of the stored trajectory whose x_k is nearest, if it is near enough."""
        import torch

        mine = x.float().flatten()
        names, known = tally.store.vectors(stamp, mine.numel(), r"[0-9a-f]{24}")
        if not names:
            return None
        distance = (known - mine).square().mean(1).sqrt()
        for index in distance.argsort(stable=True).tolist():
            if float(distance[index]) > self.radius:
                break
            entry = tally.store.take(stamp, names[index], {"vector": mine, "state": x})
            if entry is not None and torch.equal(entry["vector"], known[index]):
                tally.distances.append(float(distance[index]))
                return entry["state"]
        return None
