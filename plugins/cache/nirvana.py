"""NIRVANA: begin a prompt with the half-finished state of a similar one that was generated before."""

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
    from collections.abc import Mapping

    from torch import Tensor

    from suite.diffusion.denoiser import Cond
    from suite.diffusion.rng import SampleRng
    from suite.diffusion.sampler import Problem, Sampler
    from suite.plugins.cache._store import Store
    from suite.run import Run

UNIT = "steps skipped or states stored (rows x steps)"
ENTRY = r"[0-9a-f]{16}\.[0-9]{1,19}\.[0-9]{1,5}"
"""Names of entries; see `entry_name`."""
SAME = 1 - 1e-6
"""Similarity from which two prompts are the same one."""


@dataclass
class _Tally:
    """What happened in one run."""

    store: Store
    steps: int = 0
    skipped: int = 0
    stored: int = 0
    found: list[tuple[int, float]] = field(default_factory=list)
    why: str = ""

    def report(self) -> WrapReport:
        hits = sum(k > 0 for k, _ in self.found)
        facts = reuse(
            hits=hits,
            misses=len(self.found) - hits,
            skipped_share=self.skipped / max(1, self.steps * len(self.found)),
            bytes_held=self.store.held(),
            skipped=self.skipped,
            stored=self.stored,
            resumed_at=[k for k, _ in self.found],
            similarity=[round(s, 4) for _, s in self.found],
        )
        reason = self.why or "every state of this run is stored already, and none of another prompt was similar enough"
        did = self.skipped + self.stored
        return WrapReport(did, UNIT, facts, "" if did else reason)


@dataclass(frozen=True)
class _Found:
    """Where a row begins: after `level` steps, with `state`; its stream continues where the stored one was."""

    level: int = 0
    similarity: float = 0.0
    state: Tensor | None = None
    stream: Tensor | None = None


@dataclass(frozen=True)
class Nirvana(Plugin):
    """Agarwal 2024: x after K of T steps with a prompt is a start for similar prompts, which then need T - K steps.

    Early steps settle what prompts have in common (layout, palette), late ones the details. While generating, x is
    stored after each of the `shares` of the steps. A later prompt takes the most similar stored one: K is the share
    that belongs to the highest of the `similarity` levels which the cosine of the two prompts' vectors reaches; below
    all of them K = 0, the plain run. When the store is full, the entry with the least (steps saved) x (uses) goes.

    A prompt's vector is the mean of its conditioning's token states. The same prompt with the same seed resumes its
    own trajectory, with its stream of random numbers, and ends bit for bit where it ended before. States of the same
    prompt with *another* seed are not used: they would give the same picture again.

    Args:
        store: folder of the states; empty keeps them until the process ends.
        similarity: rising cosines, the levels.
        shares: of the steps, one a level; 0 never resumes.
        limit_mib: most memory of the folder.

    Raises:
        ConfigError: the folder cannot be used; in the run, if the conditioning holds no vectors, the solver has no grid
            or one state is larger than the limit.
    """

    store: PathOption = ""
    similarity: tuple[float, ...] = (0.65, 0.75, 0.85, 0.9, 0.95)
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    limit_mib: float = 256.0

    summary = "begin with the stored intermediate state of a similar prompt; needs a folder to be of use later"
    paper = "NIRVANA (2312.04429), sections 4.2 to 4.4"
    effects = frozenset({"trajectory", "trajectory-store", "needs-fixed-grid", "call-count", "dynamic-decision"})
    noop_options: ClassVar[dict[str, Any]] = {"shares": (0.0, 0.0, 0.0, 0.0, 0.0)}

    def __post_init__(self) -> None:
        levels, shares = self.similarity, self.shares
        if not levels or list(levels) != sorted(set(levels)) or not all(-1 <= s <= 1 for s in levels):
            raise ConfigError(f"nirvana: similarity = {_text(levels)}: expected rising cosines, e.g. 0.65/0.9")
        if len(shares) != len(levels) or list(shares) != sorted(shares) or not all(0 <= s < 1 for s in shares):
            raise ConfigError(
                f"nirvana: shares = {_text(shares)}: expected one for each of {len(levels)} similarities, not falling, "
                "from 0 to below 1"
            )
        if not self.limit_mib > 0:
            raise ConfigError(f"nirvana: limit_mib = {self.limit_mib}: expected MiB above 0")

    @property
    def lossless(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not any(self.shares)

    def levels(self, steps: int) -> list[int]:
        """K of each similarity."""
        return [int(share * steps + 1e-9) for share in self.shares]

    @hookimpl
    def cache(self, run: Run) -> Wrap:
        del run
        from suite.plugins.cache._store import Store

        tally = _Tally(Store.open("nirvana", self.store, self.limit_mib))
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
        levels = sorted(set(self.levels(steps)) - {0})
        if not levels or problem.times[0].max() < 1:
            tally.why = "no share of these steps is a step" if not levels else "the run begins in the middle already"
            return inner(problem)
        vectors = prompt_vectors(problem.cond["cond"])
        if vectors is None:
            raise ConfigError(
                "nirvana compares prompts by the vectors of their conditioning, but this model's holds "
                f"{', '.join(problem.cond['cond']) or 'nothing'} and no vectors; drop --cache nirvana"
            )
        check_fits("nirvana", problem, tally.store, 1)
        stamp = stamp_of(problem)
        kinds = [
            {"vector": vectors[row], "state": problem.x[row].cpu(), "stream": problem.rng.generators[row].get_state()}
            for row in range(len(vectors))
        ]
        rows = [self._find(k, s, stamp, steps, tally) for k, s in zip(kinds, problem.rng.seeds, strict=True)]
        tally.steps = steps
        tally.found = [(f.level, f.similarity) for f in rows]
        groups: dict[int, list[int]] = defaultdict(list)
        for row, found in enumerate(rows):
            groups[found.level].append(row)
        out = torch.empty_like(problem.x)
        for level, members in sorted(groups.items()):
            part = problem if len(groups) == 1 else some(problem, members)
            out[members] = self._resume(
                inner, part, level, [rows[m] for m in members], vectors[members], stamp, levels, tally
            )
        return out

    def _resume(
        self,
        inner: Sampler,
        part: Problem,
        level: int,
        found: list[_Found],
        vectors: Tensor,
        stamp: str,
        levels: list[int],
        tally: _Tally,
    ) -> Tensor:
        """x0 of rows that all begin after `level` steps; what they pass is stored."""
        import torch

        from suite.diffusion.start import Start, begin
        from suite.plugins.cache._trajectory import Showing

        steps = part.times.shape[0] - 1

        def show(k: int, x: Tensor, rng: SampleRng) -> None:
            for row, seed in enumerate(rng.seeds):
                stream = rng.generators[row].get_state()
                content = {"vector": vectors[row], "state": x[row], "stream": stream}
                tally.stored += tally.store.put(stamp, entry_name(vectors[row], seed, k), k, content)

        wanted = {k for k in levels if k > level}
        solver = Showing(part.solver, wanted, show, level)
        if level:
            states = torch.stack([f.state for f in found if f.state is not None])
            for row, f in enumerate(found):
                if f.stream is not None:
                    part.rng.generators[row].set_state(f.stream)
            part = begin(part, Start(lambda noise, t, rng: states.to(part.x), share=(steps - level) / steps))
            tally.skipped += level * len(found)
        return inner(replace(part, solver=solver))

    def _find(self, like: Mapping[str, Tensor], seed: int, stamp: str, steps: int, tally: _Tally) -> _Found:
        """The start of one row: of its own trajectory if that is stored, else of the most similar prompt.

        Args:
            like: a stored state of this row, as far as its kind goes; its vector is the row's own.
        """
        import torch

        vector = like["vector"]
        names, known = tally.store.vectors(stamp, vector.numel(), ENTRY)
        if not names:
            return _Found()
        cosines = known @ vector.cpu()
        for index in cosines.argsort(descending=True, stable=True).tolist():
            similarity = float(cosines[index])
            reach = [k for s, k in zip(self.similarity, self.levels(steps), strict=True) if similarity >= s - 1e-6]
            level = max(reach, default=0)
            if not level:
                return _Found()
            theirs, passed = named(names[index])
            if passed != level or (similarity >= SAME and theirs != seed):
                continue
            entry = tally.store.take(stamp, names[index], like)
            if entry is None or not torch.equal(entry["vector"], known[index]):
                continue
            if not _is_stream(entry["stream"]):
                tally.store.drop(stamp, names[index])
                continue
            return _Found(level, similarity, entry["state"], entry["stream"] if similarity >= SAME else None)
        return _Found()


def _is_stream(state: Tensor) -> bool:
    """Whether a generator takes this state."""
    import torch

    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True


def prompt_vectors(cond: Cond) -> Tensor | None:
    """[B, D] unit vectors: the means of token states [B, L, D], and pooled states [B, D]; None if there are none.

    What is only 0 and 1 says where tokens are, not what they mean.
    """
    import torch

    parts = []
    for value in cond.values():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if value.ndim == 3:
            parts.append(value.float().mean(1))
        elif value.ndim == 2 and not ((value == 0) | (value == 1)).all():
            parts.append(value.float())
    if not parts:
        return None
    return torch.nn.functional.normalize(torch.cat(parts, -1), dim=-1).cpu()


def entry_name(vector: Tensor, seed: int, level: int) -> str:
    """Of the state after `level` steps of one prompt and seed."""
    return f"{hashlib.sha256(vector.cpu().numpy().tobytes()).hexdigest()[:16]}.{seed}.{level}"


def named(name: str) -> tuple[int, int]:
    """(seed, level) of an entry."""
    _, seed, level = name.split(".")
    return int(seed), int(level)


def _text(values: tuple[float, ...]) -> str:
    return "/".join(map(str, values))
