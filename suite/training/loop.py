"""The training loop that every modality uses: one network, one loss, checkpoints that resume exactly.

The loop knows nothing of pictures or words. A modality gives a network and `loss(network, generator) -> scalar`,
which draws its own batch, times and noise from `generator`. That generator is made anew for every step from
(seed, step), so a run that was stopped and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import csv
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.files.output import write_text, writing
from suite.network.patches_as_products import patches_as_products
from suite.network.precision import resolve_dtype
from suite.training.attention import attention_for
from suite.training.checkpoint import TrainState, latest, restore, store
from suite.training.muon import Muon

Loss = Callable[[nn.Module, torch.Generator], Tensor]
Samples = Callable[[nn.Module, int], None]

_FIELDS = ("step", "loss", "lr", "seconds")


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    `muon` gives the matrices inside the repeated blocks to Muon at `muon_lr`, and the rest to AdamW at `lr`.
    Both rates follow one cosine, after `warmup` steps, down to `lr_floor` of themselves: from step `since` to `steps`,
    or over the run's minutes with `anneal: minutes`. A run ends at `steps`, or earlier at `until`.
    `ema` is the decay of the averaged weights; `average` is their share in what is kept, the rest is of the last ones.
    `precision: auto` is bf16 where the device multiplies it natively, else fp32.
    """

    steps: int = 8000
    since: int = 0
    until: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.0
    warmup: int = 200
    lr_floor: float = 0.02
    anneal: Literal["steps", "minutes"] = "steps"
    clip: float = 1.0
    ema: float = 0.999
    average: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = True
    seed: int = 0
    save_every: int = 500
    sample_every: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, choices in (
            ("optimizer", ("adamw", "muon")),
            ("anneal", ("steps", "minutes")),
            ("precision", ("auto", "bf16", "fp32")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.since < self.steps or not 0 <= self.until <= self.steps:
            raise ConfigError(
                f"train.since is {self.since}, train.until {self.until}: expected steps up to train.steps, {self.steps}"
            )
        if not 0 <= self.average <= 1:
            raise ConfigError(f"train.average is {self.average}, expected a share in [0, 1]")

    @property
    def end(self) -> int:
        """The step at which a run ends."""
        return self.until or self.steps


def train(
    network: nn.Module,
    loss: Loss,
    options: TrainOptions,
    out: Path,
    resume: bool = False,
    minutes: float | None = None,
    samples: Samples | None = None,
    device: Literal["auto", "cpu"] = "auto",
) -> TrainState:
    """Train until step `options.end`, `minutes` of this call, or Ctrl-C; the last state is saved in every case.

    Writes `out/checkpoint-<step>/` every `save_every` steps (the older one is removed) and `out/loss.csv`.
    `samples(network, step)` is called with the averaged weights every `sample_every` steps and at the end.
    Raises ConfigError when `out` already holds a run and `resume` is off, or the reverse, or the loss turns NaN.
    """
    found = latest(out)
    if found and not resume:
        raise ConfigError(f"{out} already holds a run ({found.name}): pass --resume to go on, or choose another folder")
    if resume and not found:
        raise ConfigError(f"There is no checkpoint in {out}: start without --resume")
    if options.anneal == "minutes" and not minutes:
        raise ConfigError("train.anneal is 'minutes', so the run needs a length: pass --minutes N")
    accelerator = Accelerator(cpu=device == "cpu")
    torch.manual_seed(options.seed)
    state = begin(network.to(accelerator.device), options)
    if found:
        restore(found, state, asdict(options))
    _trim_log(out, state.step)
    model = accelerator.prepare_model(patches_as_products(state.network))
    if options.compile:
        model = torch.compile(model)
    start, already, running = time.monotonic(), state.seconds, torch.zeros((), device=accelerator.device)
    since = 0
    with (
        attention_for(accelerator.device),
        _interruptible() as stop,
        _progress(options.end, state.step) as progress,
    ):
        while state.step < options.end and not stop.is_set():
            if minutes and time.monotonic() - start >= 60 * minutes:
                break
            done = (time.monotonic() - start) / (60 * minutes) if minutes and options.anneal == "minutes" else None
            rate = learning_rate(state.step, options, done)
            running += _step(model, loss, state, options, accelerator, rate)
            since += 1
            state.seconds = already + time.monotonic() - start
            if state.step % options.log_every == 0 or state.step == options.end:
                value = running.item() / since
                running, since = torch.zeros_like(running), 0
                if not math.isfinite(value):
                    raise ConfigError(
                        f"The loss is {value} at step {state.step}: lower train.lr, then resume from {latest(out)}"
                    )
                _log(out, state, value, rate * options.lr, accelerator.is_main_process)
            progress(state.step)
            if accelerator.is_main_process:
                if state.step % options.save_every == 0:
                    store(out, state, asdict(options))
                if samples and options.sample_every and state.step % options.sample_every == 0:
                    _with_average(state, samples)
        state.interrupted = stop.is_set()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store(out, state, asdict(options))
        if samples and not state.interrupted:
            _with_average(state, samples)
    return state


def begin(network: nn.Module, options: TrainOptions) -> TrainState:
    """A fresh state: the averaged weights start as a copy; the optimizers as `options` asks."""
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        # Muon is for the hidden matrices: not for embeddings, output layers, or the tables of shifts and scales.
        numbered = any(part.isdigit() for part in name.split("."))
        hidden = parameter.ndim == 2 and numbered and "scale_shift" not in name
        (matrices if options.optimizer == "muon" and hidden else others).append(parameter)
    decay = options.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=options.lr, betas=options.betas, weight_decay=decay, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=options.muon_lr, weight_decay=decay, momentum=options.momentum))
    elif options.optimizer == "muon":
        raise ConfigError("train.optimizer is 'muon', but the network has no matrices in blocks: choose adamw")
    ema = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return TrainState(network, ema, optimizers)


def learning_rate(step: int, options: TrainOptions, done: float | None = None) -> float:
    """Factor on the rates: linear warm-up times a cosine from 1 to `lr_floor`; `done` in [0, 1] replaces the steps."""
    steps = (step - options.since) / (options.steps - options.since)
    progress = min(1.0, max(0.0, steps) if done is None else done)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / max(1, options.warmup)) * (cosine * (1 - options.lr_floor) + options.lr_floor)


@contextmanager
def averaged(state: TrainState, share: float = 1.0) -> Iterator[nn.Module]:
    """The network in eval mode with `share` of the averaged weights and the rest of the last ones.

    Its own weights and mode come back bit for bit.
    """
    own = {name: value.detach().clone() for name, value in state.network.state_dict().items()}
    training = state.network.training
    mixed = dict(state.ema)
    if share < 1:
        mixed |= {n: torch.lerp(own[n], v, share) for n, v in mixed.items() if v.is_floating_point()}
    state.network.load_state_dict(mixed)
    try:
        yield state.network.eval()
    finally:
        state.network.load_state_dict(own)
        state.network.train(training)


def averaged_weights(state: TrainState, share: float = 1.0) -> dict[str, Tensor]:
    """The weights of `averaged`, copied to the CPU, with the names that the network itself has for them."""
    with averaged(state, share) as network:
        return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def generator_for(seed: int, step: int, device: torch.device, process: int = 0) -> torch.Generator:
    """The random stream of one step of one process."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=7).digest(), "big")
    return torch.Generator(device).manual_seed(mixed)


def _step(
    model: Any, loss: Loss, state: TrainState, options: TrainOptions, accelerator: Accelerator, rate: float
) -> Tensor:
    """One update of weights and averages; returns the loss, still on the device."""
    device = accelerator.device
    generator = generator_for(options.seed, state.step, device, accelerator.process_index)
    torch.manual_seed(generator.initial_seed())  # dropout inside the network draws from the global stream
    half = resolve_dtype(options.precision, device.type) == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        value = loss(model, generator)
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    accelerator.backward(value)
    nn.utils.clip_grad_norm_(state.network.parameters(), options.clip)
    for optimizer in state.optimizers:
        base = options.muon_lr if isinstance(optimizer, Muon) else options.lr
        for group in optimizer.param_groups:
            group["lr"] = base * rate
        optimizer.step()
    state.step += 1
    _average(state, options.ema)
    return value.detach()


@torch.no_grad()
def _average(state: TrainState, decay: float) -> None:
    decay = min(decay, (1 + state.step) / (10 + state.step))  # early on, forget the random start faster
    now = state.network.state_dict()
    moving = [name for name, value in state.ema.items() if value.is_floating_point()]
    torch._foreach_lerp_([state.ema[n] for n in moving], [now[n] for n in moving], 1 - decay)
    for name in state.ema.keys() - moving:
        state.ema[name].copy_(now[name])


def _with_average(state: TrainState, samples: Samples) -> None:
    with averaged(state) as network, torch.no_grad():
        samples(network, state.step)


def _log(out: Path, state: TrainState, loss: float, lr: float, write: bool) -> None:
    if not write:
        return
    path = out / "loss.csv"
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "a", newline="") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(_FIELDS)
        writer.writerow((state.step, f"{loss:.6f}", f"{lr:.3e}", f"{state.seconds:.1f}"))


def _trim_log(out: Path, step: int) -> None:
    """Drop the lines past the checkpoint, whose steps are taken again, and what a killed process wrote half of."""
    path = out / "loss.csv"
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        rows = [line for line in whole[1:] if line.count(",") == len(_FIELDS) - 1]
        kept = [row for row in rows if (at := row.split(",", 1)[0]).isdigit() and int(at) <= step]
        write_text(path, "".join([",".join(_FIELDS) + "\n", *kept]))


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never cut in half; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        del frame
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(total: int, start: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=start)
        yield lambda step: bar.update(task, completed=step)
