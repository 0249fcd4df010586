"""parallelize: guidance branches on two ranks, in real processes that talk through gloo.

This file is also the program of a rank: `python test_parallelize.py FOLDER`. Starting one costs more than all that
it computes, so one pair does everything, and fails at the end.
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond
from suite.errors import ConfigError
from suite.mesh import Mesh
from suite.plugins.parallelize.cfg import CFGParallel
from suite.testing import Tiny
from suite.wrap import Wrap, WrapReport

ROOT = Path(__file__).resolve().parents[2]
#: Generous for a loaded machine: a rank imports torch and diffusers before it starts.
LIMIT = 80.0
SEEDS = (3, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- the program of a rank -----------------------------------------------------------------------


def wrapped(tiny: Tiny, mesh: Mesh, **facts: Any) -> Wrap:
    return CFGParallel().parallelize(tiny.network, mesh, tiny.run(SEEDS, **facts))


def rank_main(folder: Path) -> None:
    mesh = Mesh.current()
    out = {"size": mesh.size, **equal(mesh), "refusal": differ(mesh)}
    torch.save(out, folder / f"{mesh.rank}.pt")
    fail(mesh)
    Mesh.leave()


def equal(mesh: Mesh) -> dict[str, Any]:
    """Results and reports of two ranks, and of one process that does both branches."""
    out: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        tiny = Tiny.build().to(dtype)
        wrap = wrapped(tiny, mesh)
        got = tiny.generate(SEEDS, wrap)
        again = tiny.generate(SEEDS, wrap, run=tiny.run(SEEDS, run_id="second"))
        out[name] = {
            "x0": got.x0,
            "second": again.x0,
            "report": got.report,
            "second_report": again.report,
            "nfe": got.counter.nfe,
            "separate": tiny.generate(SEEDS, batched=False).x0,
            "batched": tiny.generate(SEEDS).x0,
        }
    tiny = Tiny.build()
    partly = tiny.run(SEEDS, guidance_interval=(0.3, 0.6))
    got = tiny.generate(SEEDS, wrapped(tiny, mesh), run=partly)
    out["interval"] = {
        "x0": got.x0,
        "report": got.report,
        "nfe": got.counter.nfe,
        "separate": tiny.generate(SEEDS, batched=False, run=partly).x0,
    }
    never = tiny.run(SEEDS, guidance=1.0)
    out["never"] = tiny.generate(SEEDS, wrapped(tiny, mesh), run=never).report
    return out


def fail(mesh: Mesh) -> None:
    """Rank 1 breaks in the third step, when rank 0 is about to wait for it."""
    tiny = Tiny.build()
    if mesh.rank == 1:

        def broken(*arguments: Any, **named: Any) -> Tensor:
            del arguments, named
            raise RuntimeError("planted failure")

        tiny.module.get_submodule("transformer_blocks.0").register_forward_pre_hook(_at_call(3, broken))
    tiny.generate(SEEDS, wrapped(tiny, mesh))


def _at_call(number: int, function: Any) -> Any:
    calls = 0

    def hook(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            function(*arguments)

    return hook


def differ(mesh: Mesh) -> str:
    """Each rank has a seed of its own, which would mix two samples."""
    tiny = Tiny.build()
    try:
        tiny.generate((mesh.rank,), wrapped(tiny, mesh))
    except ConfigError as error:
        return str(error)
    return "accepted"


# ---- starting two of them ------------------------------------------------------------------------


def start(folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    ranks = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log
                )
            )
    return ranks


def finish(ranks: list[subprocess.Popen[bytes]], limit: float = LIMIT) -> list[int | None]:
    """Exit codes; None for a rank that had to be killed because it was still waiting."""
    deadline, codes = time.monotonic() + limit, []
    for rank in ranks:
        try:
            codes.append(rank.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            rank.kill()
            rank.wait()
    return codes


def logs(folder: Path) -> str:
    return "\n".join(f"rank {r}: {(folder / f'{r}.log').read_text()[-2000:]}" for r in range(2))


@dataclass(frozen=True)
class Pair:
    """Of one start: what each rank saved before the planted failure, how each ended, and what they wrote."""

    saved: list[dict[str, Any]]
    codes: list[int | None]
    log: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("ranks")
    codes = finish(start(folder))
    files = [folder / f"{r}.pt" for r in range(2)]
    assert all(f.is_file() for f in files), logs(folder)
    return Pair([torch.load(f, weights_only=False) for f in files], codes, logs(folder))


@pytest.fixture(scope="module")
def both(pair: Pair) -> list[dict[str, Any]]:
    return pair.saved


# ---- two ranks -----------------------------------------------------------------------------------


def test_hook_parallelize(both: list[dict[str, Any]]) -> None:
    """Two processes give what one gives that evaluates the branches one by one, bit for bit."""
    for rank in both:
        assert rank["size"] == 2
        for name in DTYPES:
            assert torch.equal(rank[name]["x0"], rank[name]["separate"]), name


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_near_the_batched_pair(both: list[dict[str, Any]], name: str, tolerance: float) -> None:
    got, batched = both[0][name]["x0"], both[0][name]["batched"]
    difference = float((got - batched).abs().max() / batched.abs().max())
    print(f"{name}: differs from the batched pair by {difference:.2g} of the largest value")
    assert difference <= tolerance


def test_ranks_draw_equal_noise_and_end_alike(both: list[dict[str, Any]]) -> None:
    for name in DTYPES:
        assert torch.equal(both[0][name]["x0"], both[1][name]["x0"])


def test_each_rank_evaluates_one_branch(both: list[dict[str, Any]]) -> None:
    for rank in both:
        report = rank["fp32"]["report"]
        steps = Tiny.build().steps
        assert report.did == steps and rank["fp32"]["nfe"] == steps
        size = rank["fp32"]["x0"].numel() * 4
        assert report.facts == {"world": 2, "bytes_gathered": steps * size}


def test_a_second_run_counts_from_zero_and_is_equal(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert torch.equal(rank["bf16"]["second"], rank["bf16"]["x0"])
        assert rank["bf16"]["second_report"] == rank["bf16"]["report"]


def test_one_branch_outside_of_the_interval(both: list[dict[str, Any]]) -> None:
    """It runs on both ranks and sends nothing."""
    for rank in both:
        part = rank["interval"]
        assert torch.equal(part["x0"], part["separate"])
        steps = Tiny.build().steps
        assert 0 < part["report"].did < steps
        assert part["nfe"] == steps


def test_without_guidance_it_says_that_it_did_nothing(both: list[dict[str, Any]]) -> None:
    report = both[0]["never"]
    assert report.did == 0 and "carried two branches" in report.reason


def test_a_failing_rank_ends_the_other(pair: Pair) -> None:
    assert None not in pair.codes, f"a rank hung: {pair.codes}\n{pair.log}"
    assert 0 not in pair.codes, f"a rank went on alone: {pair.codes}\n{pair.log}"
    assert "planted failure" in pair.log


def test_ranks_with_different_seeds_are_refused(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert "different states" in rank["refusal"]


# ---- one rank, or too many -----------------------------------------------------------------------


def test_one_process_is_told_how_to_start_two() -> None:
    tiny = Tiny.build()
    wrap = wrapped(tiny, Mesh())
    assert wrap.denoiser is None
    report = tiny.generate(wrap=wrap).report
    assert isinstance(report, WrapReport)
    assert report.did == 0 and report.reason == "one process: start it with --launch 2"


@pytest.mark.parametrize("size", [3, 4, 8])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"two ranks, got {size}.*--launch 2"):
        wrapped(Tiny.build(), Mesh(0, size))


class Echo:
    """A denoiser that gives its state back and keeps what it was called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Cond, Call]] = []

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        self.seen.append((x, t, cond, call))
        return x


class Loop(Mesh):
    """Two ranks in one process, the other of which holds the same."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x, x]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_sees_its_own_rows(rank: int) -> None:
    tiny, inner = Tiny.build(), Echo()
    wrap = wrapped(tiny, Loop(rank, 2))
    assert wrap.denoiser is not None
    x, t = torch.arange(4.0)[:, None], torch.linspace(0.1, 0.4, 4, dtype=torch.float64)[:, None]
    cond = {"text": torch.arange(4), "size": "large"}
    call = Call(0, 1, 0.4, 0.0, branch="cond+uncond", run_id="r")
    out = wrap.denoiser(inner).denoise(x, t, cond, call)
    mine = slice(2 * rank, 2 * rank + 2)
    ((got_x, got_t, got_cond, got_call),) = inner.seen
    assert (
        torch.equal(got_x, x[mine])
        and torch.equal(got_t, t[mine])
        and torch.equal(got_cond["text"], cond["text"][mine])
    )
    assert got_cond["size"] == "large" and got_call.branches == (("cond", "uncond")[rank],)
    assert torch.equal(out, torch.cat([x[mine], x[mine]]))


def test_three_branches_are_refused() -> None:
    wrap = wrapped(Tiny.build(), Loop(0, 2))
    assert wrap.denoiser is not None
    call = Call(0, 1, 1.0, 0.0, branch="cond+uncond+ref")
    with pytest.raises(ConfigError, match="two guidance branches, got 3"):
        wrap.denoiser(Echo()).denoise(torch.zeros(3, 1), torch.tensor(1.0), {}, call)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
