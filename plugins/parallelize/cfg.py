"""CFG parallelism: one guidance branch a rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.wrap import Wrap, WrapReport

if TYPE_CHECKING:
    from torch import Tensor

    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.diffusion.sampler import Problem, Sampler
    from suite.mesh import Mesh
    from suite.network import Network
    from suite.run import Run

RANKS = 2


@dataclass
class _Tally:
    """Counts of one run; the wrap outlives it."""

    run_id: str | None = None
    calls: int = 0
    moved: int = 0
    received: int = 0

    def start(self, run_id: str) -> None:
        if run_id != self.run_id:
            self.run_id, self.calls, self.moved, self.received = run_id, 0, 0, 0


@dataclass(frozen=True)
class _OneBranchARank:
    """The denoiser of both branches, of which this rank evaluates its own."""

    inner: Denoiser
    mesh: Mesh
    tally: _Tally = field(compare=False)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        import torch

        from suite.diffusion.denoiser import rows

        self.tally.start(call.run_id)
        self.tally.calls += 1
        branches = call.branches
        if len(branches) == 1:
            return self.inner.denoise(x, t, cond, call)
        if len(branches) != RANKS:
            raise ConfigError(
                f"cfg places two guidance branches, got {len(branches)} ({call.branch}); drop --parallelize cfg"
            )
        if self.tally.moved == 0:
            check_alike(
                self.mesh,
                x,
                "cfg: the ranks start from different states; give every rank the same prompts, seed and num",
            )
        count = x.shape[0] // RANKS
        start, stop = self.mesh.rank * count, (self.mesh.rank + 1) * count
        times = t if t.ndim == 0 else t[start:stop]
        mine = call.on(branches[self.mesh.rank], together=call.together or call.branch)
        own = self.inner.denoise(x[start:stop], times, rows(cond, start, stop), mine)
        both = torch.cat(self.mesh.all_gather(own))
        self.tally.moved += 1
        self.tally.received += own.numel() * own.element_size()
        return both


def check_alike(mesh: Mesh, x: Tensor, message: str) -> None:
    """Branches of different states would be mixed silently, so ranks compare a checksum before and after a run."""
    import torch

    bits = x.detach().contiguous()
    if bits.is_floating_point():
        bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    own = torch.stack([bits.sum(dtype=torch.int64), bits.new_tensor(x.numel(), dtype=torch.int64)])
    if not all(torch.equal(own, other) for other in mesh.all_gather(own)):
        raise ConfigError(message)


@dataclass(frozen=True)
class _EndAlike:
    """The sampler, after which all ranks must hold the same: what decides by the branch alone would part them."""

    inner: Sampler
    mesh: Mesh

    def __call__(self, problem: Problem) -> Tensor:
        x = self.inner(problem)
        check_alike(
            self.mesh,
            x,
            "cfg: the ranks ended with different results: a cache of the recipe reuses on one what it computes on the "
            "other (state kept by call.branch instead of call.key); drop that cache or --parallelize cfg",
        )
        return x


@dataclass(frozen=True)
class CFGParallel(Plugin):
    """Rank 0 evaluates `cond`, rank 1 `uncond`; both then hold both (an all-gather of x0 each evaluation).

    Halves the work of a rank while guidance acts. Evaluations with one branch (outside of the guidance
    interval) run on every rank and send nothing. Caches reuse as they do for the batched pair (`Call.key`), so a
    branch that goes on alone after the interval is computed anew on all ranks.

    Lossless: each branch is evaluated as it would be alone, so the result is that of a single process with
    unbatched branches, bit for bit (fp32 and bf16, on a CPU). Against the batched pair of the default
    guidance it may differ by the rounding of differently shaped products: measured on a random PixArt of width
    32, 12 steps, by 4e-7 of the largest value in fp32 and not at all in bf16.
    """

    summary = "one guidance branch a rank; needs two processes"
    paper = "xDiT (2411.01738), section 4.3"
    lossless = True
    effects = frozenset({"branch-axis", "needs-guidance", "call-count"})

    @hookimpl
    def parallelize(self, network: Network, mesh: Mesh, run: Run) -> Wrap:
        del network
        what = "evaluations moved to the other rank"
        if mesh.size == 1:
            reason = "one process: start it with --launch 2"
            return Wrap(report=lambda: WrapReport(0, what, {"world": 1, "bytes_gathered": 0}, reason))
        if mesh.size != RANKS:
            raise ConfigError(f"cfg places two guidance branches on two ranks, got {mesh.size}; use --launch 2")
        tally = _Tally()

        def report() -> WrapReport:
            facts = {"world": mesh.size, "bytes_gathered": tally.received}
            reason = "" if tally.moved else _why_nothing(tally, run)
            return WrapReport(tally.moved, what, facts, reason)

        return Wrap(
            report=report,
            denoiser=lambda inner: _OneBranchARank(inner, mesh, tally),
            sampler=lambda inner: _EndAlike(inner, mesh),
        )


def _why_nothing(tally: _Tally, run: Run) -> str:
    low, high = run.guidance_interval
    if not tally.calls:
        return "the network was not evaluated"
    return (
        f"none of {tally.calls} evaluations carried two branches: guidance {run.guidance:g} acts for times from "
        f"{low:g} to {high:g}, and its branches must travel as one batch"
    )
