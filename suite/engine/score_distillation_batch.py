"""The `distill` driver: distils the samples of a batch one after the other, and keeps checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from suite.diffusion.denoiser import Counter, Denoiser, NetworkDenoiser
from suite.diffusion.sampler import Sampler
from suite.engine.lora import lora
from suite.engine.score_distillation import Distillation, Distilled, Representation, distill
from suite.engine.score_distillation_options import iterations
from suite.errors import ConfigError
from suite.files.inputs import check
from suite.files.output import check_folder, write
from suite.observe.finite import check_tensors

if TYPE_CHECKING:
    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.schedule import Schedule
    from suite.diffusion.solver import Solver
    from suite.modality import Modality
    from suite.request import Request
    from suite.run import Run

KEEP_EVERY = 30.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Lesson:
    """What a batch is distilled with.

    Attributes:
        modality, run, request, schedule, solver, noise: of the engine.
        teacher: (counter) -> the bare network, the guided denoiser and the sampler, all evaluations counted there.
        another: loads the model once more, without any wrap.
    """

    modality: Modality
    run: Run
    request: Request
    schedule: Schedule
    solver: Solver
    noise: NoiseSchedule
    teacher: Callable[[Counter], tuple[NetworkDenoiser, Denoiser, Sampler]]
    another: Callable[[], Modality]


def distill_batch(lesson: Lesson, counter: Counter, on_step: Callable[[int], object]) -> list[Distilled]:
    """One representation a prompt, one after the other, so that a result does not depend on its batch.

    A Ctrl-C ends the sample at hand where it is and leaves out those that follow. `counter` gets evaluations a
    sample (views and branches counted apart) and the sequential calls of all.

    Raises:
        ConfigError: the options do not fit each other, the solver or the model.
        KeyboardInterrupt: stopped before there was anything to keep.
    """
    run, request = lesson.run, lesson.request
    total, method = iterations(run.steps, request.options), str(request.options["distill"])
    place = request.options["checkpoint"]
    if place and request.batch > 1:
        raise ConfigError(f"--checkpoint keeps the state of one sample; this run has {request.batch}")
    done: list[Distilled] = []
    for index, seed in enumerate(run.seeds):
        own = Counter()
        bare, denoiser, sampler = lesson.teacher(own)
        score = None
        if method == "vsd":
            student = lesson.another()
            score = lora(student.network, replace(bare, forward=student.forward), seed=seed)
        representation = lesson.modality.representation(request, index, seed)
        keeper = Checkpoint.at(str(place), lesson, representation) if place else None
        first = min(total, keeper.resume()) if keeper else 0
        problem = Distillation(
            representation,
            denoiser,
            lesson.schedule,
            lesson.solver,
            lesson.noise,
            run,
            seed=seed,
            sampler=sampler,
            method=method,
            iterations=total,
            first=first,
            target_steps=int(request.options["target-steps"] or 1),
            score=score,
            on_step=lambda step, before=index * total: on_step(before + step),
            keep=keeper.keep if keeper else lambda step: None,
        )
        log: list[dict[str, float]] = []
        complete = False
        try:
            distill(problem, log)
            complete = True
        except KeyboardInterrupt:
            if not log and not done:
                raise
        finally:
            counter.nfe += own.nfe * int(request.options["views"] or 1) / request.batch
            counter.depth += own.depth
            if keeper and log:
                keeper.write(first + len(log))
        if log or complete:
            done.append(Distilled(representation, log, complete))
        if not complete:
            break
    return done


@dataclass
class Checkpoint:
    """The state of one representation in one safetensors file, with what it belongs to."""

    file: Path
    facts: Mapping[str, Any]
    representation: Representation
    written: float = field(default_factory=time.monotonic)

    @staticmethod
    def at(place: str, lesson: Lesson, representation: Representation) -> Checkpoint:
        """The checkpoint of a run. ConfigError if its folder cannot be written."""
        file = Path(place)
        check_folder(file.parent)
        run, request = lesson.run, lesson.request
        facts = {"model": run.model, "prompt": request.prompts[0], "negative": request.negative, "seed": run.seeds[0]}
        return Checkpoint(file, facts, representation)

    def resume(self) -> int:
        """Take up the state if the file exists; returns the iterations that are done.

        The optimiser's moments are not kept: they are made anew within some ten iterations.

        Raises:
            ConfigError: the file is damaged, or of another prompt, seed or model.
        """
        if not self.file.exists():
            return 0
        check(self.file, "checkpoint")
        try:
            with safe_open(self.file, "pt") as box:
                facts = json.loads((box.metadata() or {})["distill"])
                state = {name: box.get_tensor(name) for name in box.keys()}
            check_tensors(state, self.file)
            count = int(facts.pop("iterations"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(f"checkpoint {self.file} is damaged or is none ({error}); delete it") from error
        if facts != dict(self.facts):
            name = next(k for k in self.facts if facts.get(k) != self.facts[k])
            raise ConfigError(
                f"checkpoint {self.file} is of {name} {facts.get(name)!r}, this run has {self.facts[name]!r}; "
                "delete it, or name another file"
            )
        self.representation.restore(state)
        return count

    def keep(self, index: int) -> None:
        """Write the state if it is time to."""
        if time.monotonic() - self.written >= KEEP_EVERY:
            self.write(index + 1)

    def write(self, count: int) -> None:
        """Write the state after `count` iterations, atomically."""
        text = json.dumps({**self.facts, "iterations": count})
        state = {name: value.detach().contiguous() for name, value in self.representation.state().items()}
        write(self.file, lambda temporary: save_file(state, temporary, {"distill": text}))
        self.written = time.monotonic()
