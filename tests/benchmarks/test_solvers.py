"""What one solver step costs outside the network, against diffusers' scheduler step for the same method.

Both get the same network output (epsilon, or a velocity) and turn it into x0 themselves. Interleaved, one thread, in
CPU time: another process on the machine then counts only as far as it takes cache and bandwidth away.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from suite.diffusion.noise import Flow, NoiseSchedule, VPTable
from suite.diffusion.prediction import Prediction, x0_weights
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Solver, combine
from suite.plugins.solvers.ancestral import AncestralSolver
from suite.plugins.solvers.ddim import DDIMSolver
from suite.plugins.solvers.deis import DEISSolver
from suite.plugins.solvers.dpmpp_2m import DPMpp2MSolver
from suite.plugins.solvers.heun import HeunSolver
from suite.plugins.solvers.lcm import LCMSolver
from suite.plugins.solvers.sa import SASolver
from suite.plugins.solvers.sde_dpmpp import SDEDPMppSolver
from suite.plugins.solvers.unipc import UniPCSolver
from suite.testing.oracles import a_run

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore:__array", "ignore:.*deprecated")]
SHAPES = {"image 1024 px": (1, 4, 128, 128), "video 5 s": (1, 16, 21, 60, 104)}
STEPS, ROUNDS = 12, 7
TABLE: dict[str, Any] = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
#: name -> our solver, class in diffusers, its options.
METHODS: dict[str, tuple[Callable[[NoiseSchedule], Solver], str, dict[str, Any]]] = {
    "ddim": (lambda n: DDIMSolver(n, 0.0), "DDIMScheduler", {"clip_sample": False}),
    "euler (flow)": (lambda n: DDIMSolver(n, 0.0), "FlowMatchEulerDiscreteScheduler", {}),
    "heun": (HeunSolver, "HeunDiscreteScheduler", {}),
    "dpmpp-2m": (DPMpp2MSolver, "DPMSolverMultistepScheduler", {}),
    "deis-2 (log rho)": (lambda n: DEISSolver(n, 2, "log-rho"), "DEISMultistepScheduler", {}),
    "unipc-2": (lambda n: UniPCSolver(n, 2, "bh2", True), "UniPCMultistepScheduler", {}),
    "lms": (lambda n: DEISSolver(n, 4, "rho"), "LMSDiscreteScheduler", {}),
    "ancestral": (lambda n: AncestralSolver(n, "fixed-small"), "DDPMScheduler", {"clip_sample": False}),
    "sde-dpmpp-2": (
        lambda n: SDEDPMppSolver(n, 2), "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"},
    ),
    "sa-2-2": (lambda n: SASolver(n, 2, 2, 1.0, (0.2, 0.8), True), "SASolverScheduler", {}),
    "lcm": (lambda n: LCMSolver(n, 10.0), "LCMScheduler", {"original_inference_steps": 48}),
}  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts operations on tensors of the state's size, and among them copies."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.all, self.large, self.copies, self.bytes = size, 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.all += 1
        views = ("view", "expand", "unsqueeze", "detach", "alias", "select", "reshape", "_unsafe_view")
        tensors = [a for a in (*args, out) if isinstance(a, Tensor) and a.numel() == self.size]
        if tensors and name not in views:
            self.large += 1
            self.copies += name in ("_to_copy", "copy_", "clone")
            self.bytes += sum(a.numel() * a.element_size() for a in tensors)
        return out


def ours(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """A whole run of our solver, the network's output prepared."""
    flow = "flow" in name
    noise: NoiseSchedule = Flow() if flow else VPTable.named("scaled_linear")
    solver = METHODS[name][0](noise)
    kind = Prediction.FLOW if flow else Prediction.EPSILON
    output, x0 = torch.randn(shape), torch.randn(shape)
    times = torch.linspace(0.98, 0, STEPS + 1, dtype=torch.float64)
    rng, run = SampleRng((0,)), a_run(steps=STEPS)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return combine(x0_weights(kind)(noise, t), (x, output))

    def whole() -> None:
        x, state = x0, solver.begin(run, times)
        for k in range(STEPS):
            x, state = solver.step(denoise, x, times[k], times[k + 1], state, rng)

    return whole


def theirs(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """The same of diffusers; setting the timesteps is not part of it."""
    import diffusers

    _, cls, options = METHODS[name]
    plain = {"FlowMatchEulerDiscreteScheduler": {}, "LCMScheduler": {"beta_schedule": "scaled_linear"}}
    scheduler: Any = getattr(diffusers, cls)(**plain.get(cls, TABLE), **options)
    output, x0, generator = torch.randn(shape), torch.randn(shape), torch.Generator().manual_seed(0)
    scales = hasattr(type(scheduler), "scale_model_input")
    draws = "generator" in scheduler.step.__code__.co_varnames

    def whole() -> None:
        x = x0
        for k in scheduler.timesteps:
            if scales:
                scheduler.scale_model_input(x, k)
            x = scheduler.step(output, k, x, **({"generator": generator} if draws else {})).prev_sample

    def fresh() -> None:
        scheduler.set_timesteps(STEPS)
        whole.start = time.process_time()  # pyright: ignore[reportFunctionMemberAccess]
        whole()

    fresh.inner = whole  # pyright: ignore[reportFunctionMemberAccess]
    return fresh


def milliseconds(run: Callable[[], None]) -> float:
    """Of one step; a run that prepares something says when it began."""
    start = time.process_time()
    run()
    end = time.process_time()
    inner = getattr(run, "inner", None)
    return 1000 * (end - (inner.start if inner else start)) / STEPS


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def counted(run: Callable[[], None], shape: tuple[int, ...]) -> Ops:
    counter = Ops(torch.Size(shape).numel())
    if hasattr(run, "inner"):
        run()  # set the timesteps and step once, so that what is counted is stepping alone
    with counter:
        run()
    return counter


def bandwidth() -> float:
    """Bytes a second of a copy that does not fit the cache: two passes over 64 MiB."""
    source = torch.randn(16 * 2**20)
    target, seconds = torch.empty_like(source), []
    for _ in range(9):
        start = time.process_time()
        target.copy_(source)
        seconds.append(time.process_time() - start)
    return 2 * source.numel() * 4 / statistics.median(seconds)


@pytest.mark.parametrize("place", SHAPES)
def test_a_step_against_diffusers(place: str) -> None:
    """Milliseconds a step, their ratio with quartiles of the pairs, counted operations, and the floor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = SHAPES[place]
    rate, size = bandwidth(), torch.Size(shape).numel() * 4
    least = 3e3 * size / rate  # two tensors in and one out
    print(f"\n{place} {list(shape)}, {rate / 1e9:.1f} GB/s, floor {least:.3f} ms")
    print("| method | ours, ms | diffusers, ms | ours / diffusers | large ops | copies | MB moved | x floor |")
    ratios: dict[str, float] = {}
    for name in METHODS:
        pair = (ours(name, shape), theirs(name, shape))
        ops = [counted(run, shape) for run in pair]
        for run in pair:
            run()
        times = [[milliseconds(run) for run in pair] for _ in range(ROUNDS)]
        mine, other = ([t[i] for t in times] for i in (0, 1))
        ratio = [a / b for a, b in times]
        ratios[name] = statistics.median(ratio)
        large, copies = (" / ".join(f"{getattr(o, f) / STEPS:.1f}" for o in ops) for f in ("large", "copies"))
        moved = " / ".join(f"{o.bytes / STEPS / 1e6:.1f}" for o in ops)
        cells = [quartiles(v) for v in (mine, other, ratio)]
        cells += [large, copies, moved, f"{statistics.median(mine) / least:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    torch.set_num_threads(threads)
    # Flow Euler's step in diffusers is x + dt v alone; ours goes by x0, as every solver here does, in as many passes.
    slower = [name for name, ratio in ratios.items() if ratio > 1 and name != "euler (flow)"]
    assert not slower, f"slower than diffusers: {slower}"


BLOCK = 2**18


def in_blocks(coefficients: tuple[float, ...], tensors: list[Tensor]) -> Tensor:
    """The plain combination, block by block, so that a sum is taken while it is in the cache."""
    out = torch.empty_like(tensors[0])
    for target, first, *rest in zip(*(t.view(-1).split(BLOCK) for t in (out, *tensors)), strict=True):
        torch.mul(first, coefficients[0], out=target)
        for value, part in zip(coefficients[1:], rest, strict=True):
            target.add_(part, alpha=value)
    return out


@pytest.mark.parametrize("place", SHAPES)
def test_ways_to_combine(place: str) -> None:
    """sum_i a_i x_i of 2 to 4 tensors: in place (what solvers use), in blocks, and compiled into one pass."""
    torch.set_num_threads(1)
    shape = SHAPES[place]
    print(f"\n{place} {list(shape)}\n| tensors | in place, ms | in blocks | compiled | first call, s |")
    for count in (2, 3, 4):
        values = (0.3, 0.6, -0.2, 0.5)[:count]
        tensors = [torch.randn(shape) for _ in values]
        weights = [torch.tensor(v) for v in values]
        names = [f"a{k}" for k in range(count)]
        sums = " + ".join(f"{n} * x{n}" for n in names)
        space: dict[str, Any] = {}
        exec(f"def fused({', '.join(names)}, {', '.join(f'x{n}' for n in names)}): return {sums}", space)
        fused = torch.compile(space["fused"], dynamic=True)
        start = time.perf_counter()
        torch.testing.assert_close(fused(*weights, *tensors), combine(values, tensors))
        first = time.perf_counter() - start
        ways: list[Callable[[], Any]] = [
            lambda v=values, t=tensors: combine(v, t),
            lambda v=values, t=tensors: in_blocks(v, t),
            lambda f=fused, w=weights, t=tensors: f(*w, *t),
        ]
        assert torch.equal(ways[0](), ways[1]())
        runs: list[list[float]] = [[] for _ in ways]
        for _ in range(30):
            for way, run in zip(ways, runs, strict=True):
                begin = time.process_time()
                way()
                run.append(1e3 * (time.process_time() - begin))
        print(f"| {count} | {' | '.join(quartiles(run) for run in runs)} | {first:.1f} |")
    rng, x = SampleRng((0,)), torch.empty(shape)
    draws = []
    for _ in range(9):
        begin = time.process_time()
        rng.normal_like(x)
        draws.append(1e3 * (time.process_time() - begin))
    print(f"drawing the noise of a step: {quartiles(draws)} ms")
