"""`Engine`: loads a model once, folds the wraps, generates by the `sample` or the `distill` driver, reports."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.call import Call
from suite.diffusion.denoiser import Cond, Counter, Denoiser, NetworkDenoiser
from suite.diffusion.guidance import Guidance
from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, Progress, Sampler, march
from suite.diffusion.schedule import Schedule, check_timesteps
from suite.diffusion.solver import Solver
from suite.diffusion.start import Init, Start, begin, noised
from suite.engine.ambient import put_aside
from suite.engine.arguments import prompts_of, seeds_of, text, whole
from suite.engine.encodings import Encodings
from suite.engine.result import Result
from suite.engine.score_distillation import Distilled
from suite.engine.score_distillation_batch import Lesson, distill_batch
from suite.engine.turn import Turn
from suite.errors import ConfigError, PluginError
from suite.fitting.calibration import Calibration, Record
from suite.host.device import resolve_device
from suite.host.manager import Active
from suite.host.plan import Plan, make_plan
from suite.host.prompts import MAX_SEED, RANDOM, expand
from suite.mesh import Mesh
from suite.modality import Modality
from suite.network import Network
from suite.network.experts import Companion, Companions, companion_folder, switched
from suite.network.precision import resolve_dtype
from suite.observe.activity import Activity
from suite.observe.attribution import Link, applied, attributed, undo_all, undone
from suite.observe.cache_memory import CacheMemory
from suite.observe.finite import Watch, is_finite
from suite.observe.macs import counting
from suite.observe.report import PluginReport, RunReport, peak_memory, versions
from suite.observe.reporting import Clock, plugin_reports, started
from suite.recipe import Recipe
from suite.request import Request, Value, resolve
from suite.run import Run
from suite.wrap import Wrap

OnStep = Callable[[int], object] | Callable[[int, Progress], object]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """One loaded model with its plugins. Use `Engine.from_recipe(...)`; `close()` or a `with` block ends it.

    What it promises, in more words in docs/python.md:

    - One run at a time: other threads wait, and get what they would get alone. A run from within a run is refused.
    - After an error or Ctrl-C, wherever it came from, the engine is as good as a fresh one.
    - What enters and what leaves is finite: weights, files, results; otherwise an error says where it was not.
    - `no_grad`, `inference_mode`, autocast, default type and device of the caller make no difference, and are left as
      they were; so is the global random state, of which nothing is drawn.
    - A closed engine refuses to generate. An engine cannot be pickled; its `plan` and its results can.
    """

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        started = time.perf_counter()
        self.plan = plan
        self.mesh = Mesh.current()
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(plan.recipe.dtype or "auto", self.device)
        # Until someone sets the number of threads, MKL may take fewer than that, as the machine's load has it, and
        # sums in another order: a replay, which sets it, could then differ from the first run of a process.
        torch.set_num_threads(torch.get_num_threads())
        self._turn = Turn()
        self._stamp = stamp(plan, self.dtype)
        self._encoded = Encodings()
        self._loaded: list[tuple[Active, Wrap | None]] = []
        with put_aside(self.device):
            cls: type[Modality] = plan.modality.load()
            self.modality = cls(plan.folder, self.device, DTYPES[self.dtype])
            self.network: Network = self.modality.network
            try:
                self._open(self._run(self.request(("",)), (0,)))
            except BaseException:
                undo_all(self._loaded, plan.manager.active)
                raise
        self._load_seconds = time.perf_counter() - started

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        *,
        modality: str = "image",
        model: str | None = None,
        device: str | None = None,
        exact: bool = False,
        allow_noop: bool = False,
        cache_limit: float | None = None,
    ) -> Engine:
        """Check the request (see `suite.host.plan.make_plan`), load the model, apply compress and parallelize.

        Raises:
            ConfigError, PluginError: see `make_plan`; also a model whose files do not fit.
        """
        plan = make_plan(modality, recipe, model=model, exact=exact, allow_noop=allow_noop, cache_limit=cache_limit)
        return cls(plan, device)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Undo parallelize and compress, newest first, after the run at hand. Once more does nothing.

        Raises:
            PluginError: a plugin could not; the others have.
        """
        with self._turn.taken(closing=True):
            self._turn.closed = True
            loaded, self._loaded = self._loaded, []
            failed = undo_all(loaded, self.plan.manager.active)
            self.network = self.modality.network
        if failed:
            raise failed

    def __getstate__(self) -> Any:
        raise TypeError(
            "an Engine holds a loaded model and cannot be copied or pickled; hand over its recipe, and make one there "
            "with Engine.from_recipe(...)"
        )

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """This thread's turn, with what the caller has set for tensors put aside."""
        with self._turn.taken(), put_aside(self.device):
            yield

    def under(self, plan: Plan) -> Engine:
        """The same loaded model under another plan, for tools that compare plans without loading each.

        The plans may differ in what acts once a run: schedule, solver, caches, steps, guidance. This engine stays
        the owner: close it, and not the one that is returned.

        Raises:
            ConfigError: they differ in what acts once a load.
        """

        def loaded(p: Plan) -> tuple[Any, ...]:
            dtype = resolve_dtype(p.recipe.dtype or "auto", self.device)
            return p.modality.name, p.folder.path, dtype, p.recipe.compress, p.recipe.parallelize

        self._turn.check_open()
        if loaded(plan) != loaded(self.plan):
            raise ConfigError(
                "a loaded model cannot go over to another modality, model, dtype, compressor or way to use ranks; "
                "load it anew"
            )
        other = object.__new__(Engine)
        other.__dict__.update(self.__dict__)
        other.plan, other._stamp = plan, stamp(plan, self.dtype)
        actives = [a for hook in ("compress", "parallelize") for a in plan.manager.of(hook)]
        other._loaded = [(active, wrap) for active, (_, wrap) in zip(actives, self._loaded, strict=True)]
        return other

    def init(self, path: str | Path, strength: float | None = None) -> Init:
        """A file to begin with; see `suite.diffusion.start.Init.of`."""
        return Init.of(type(self.modality), path, strength)

    def request(
        self,
        prompts: Sequence[str],
        negative: str = "",
        options: Mapping[str, Any] | None = None,
        init: Init | None = None,
    ) -> Request:
        """The request of one batch.

        Raises:
            ConfigError: an option that this modality has not, a value that it does not take, or a file of another.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(f"options: expected a mapping of names to values, got {type(options).__name__}")
        if init is not None and not isinstance(init, Init):
            raise ConfigError(f"init: expected what engine.init(FILE) returns, got {type(init).__name__}")
        if init and init.modality != type(self.modality).name:
            raise ConfigError(
                f"init {init.name} was read for the modality {init.modality}; this engine makes {self.modality.name}: "
                "read it with engine.init(FILE)"
            )
        values = resolve(self.modality.options, options, self.plan.modality.name)
        return Request(tuple(prompts), text(negative, "negative"), values, init)

    def _run(self, request: Request, seeds: Sequence[int]) -> Run:
        recipe = self.plan.recipe
        assert recipe.steps is not None and recipe.guidance is not None and recipe.guidance_interval is not None
        return Run(
            modality=self.plan.modality.name,
            model=self.plan.folder.name,
            device=self.device,
            dtype=self.dtype,
            steps=recipe.steps,
            batch=request.batch,
            seeds=tuple(seeds),
            guidance=recipe.guidance,
            guidance_interval=recipe.guidance_interval,
            world=self.mesh.size,
            tokens=self.modality.tokens(request),
            mode=self.modality.driver,
            facts=request.options,
            run_id=uuid.uuid4().hex,
            stamp=self._stamp,
        )

    def _open(self, run: Run) -> None:
        """Compress, then parallelize: once a load, in the order of the recipe."""
        manager = self.plan.manager
        calibration = Calibration(self.modality.calibration_prompts, self._record)
        companions = Companions(cache(self._companion))
        for hook in ("compress", "parallelize"):
            for active in manager.of(hook):
                with attributed(active, hook, manager.active):
                    if hook == "compress":
                        wrap = manager.compress(self.network, calibration, run, companions, active)
                    else:
                        wrap = manager.parallelize(self.network, self.mesh, run, active)
                    self._loaded.append((active, wrap))
                    if wrap and wrap.network:
                        self.network = applied(active, wrap, self.network)

    def _companion(self, name: str) -> Companion:
        """Another model that fits this one, opened."""
        folder, other = companion_folder(self.plan.folder, name), self.modality
        if folder is not self.plan.folder:
            other = type(self.modality)(folder, self.device, DTYPES[self.dtype])
        return Companion(folder.name, folder.hash, other.network, other.forward)

    def _record(self, prompts: Sequence[str]) -> list[Record]:
        """Inputs of the network over one run, with the caches of the recipe.

        What a cache skips is not seen, and what it leaves is what will be computed (C16: calibrating without the cache
        and then stacking it is far worse). Plugins that store trajectories for later runs are left out.
        """
        records: list[Record] = []

        class Recorder:
            def __init__(self, inner: Denoiser) -> None:
                self.inner = inner

            def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
                with torch.inference_mode(False):  # plugins may differentiate what they make of it
                    kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in cond.items()}
                    records.append(Record(x.clone(), t.clone(), kept, call))
                return self.inner.denoise(x, t, cond, call)

        request = self.request(prompts)
        run = self._run(request, range(len(prompts)))
        chain: list[Link] = [(None, Wrap(report=lambda: _unused(), denoiser=Recorder))]
        network, manager, noise = self.network, self.plan.manager, self._noise(run)
        with undone(network.module, chain, manager.active):
            for active in manager.of("cache"):
                if "trajectory-store" not in active.plugin.effects:
                    network = self._install(active, run, network, noise, chain)
            wraps = [wrap for _, wrap in chain if wrap]
            self._sample(run, request, self.modality.encode(request), wraps, Counter(), lambda p: None, network)
        return records

    def _install(self, active: Active, run: Run, network: Network, noise: NoiseSchedule, chain: list[Link]) -> Network:
        """The network with one cache's wrap, which joins the chain."""
        with attributed(active, "cache", self.plan.manager.active):
            wrap = self.plan.manager.cache(network, run, active, noise)
            chain.append((active, wrap))
            return applied(active, wrap, network) if wrap and wrap.network else network

    def problem(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        counter: Counter,
        observe: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Problem:
        """What the sampler would get for this batch, for tools that evaluate or step a model themselves.

        Compress and parallelize are in force, caches are not; evaluations go to `counter`. `observe` is put around
        the denoiser below guidance, where a cache would be.

        Raises:
            ConfigError: see `schedule_and_solver`.
        """
        request = self.request(prompts)
        run = self._run(request, seeds)
        with self._busy():
            schedule, noise, solver = self.schedule_and_solver(run)
            times = schedule.timesteps(noise, run.steps)
            check_timesteps(times, run.steps)
            rng = SampleRng(run.seeds)
            x = self.modality.prior(request, rng).to(self.device)
            wraps = [wrap for _, wrap in self._loaded if wrap]
            wraps += [Wrap(report=lambda: _unused(), denoiser=observe)] if observe else []
            _, guided, _ = self._chain(run, request, noise, wraps, counter)
            return Problem(x, times, guided, self.modality.encode(request), solver, noise, rng, run)

    def bare(self, run: Run, counter: Counter) -> Denoiser:
        """The network as a denoiser, without wraps and guidance; it remembers nothing of earlier calls."""
        return self._chain(run, self.request(("",)), self._noise(run), [], counter)[0]

    def _grid(self, run: Run) -> list[float]:
        """The times of a run, as `Call` says them.

        Raises:
            ConfigError: it has none that are known beforehand.
        """
        words = frozenset().union(*(a.plugin.effects for a in self.plan.manager.of("solver")))
        if self.modality.driver != "sample" or "adaptive-grid" in words:
            raise ConfigError("which blocks run at which step cannot be told where the steps are not known beforehand")
        schedule, noise, _ = self.schedule_and_solver(run)
        times = schedule.timesteps(noise, run.steps)
        return (times if times.ndim == 1 else times.amax(1)).tolist()

    def _noise(self, run: Run) -> NoiseSchedule:
        """The noise schedule in force: the model's, unless the `schedule` plugin replaced it."""
        return self.plan.manager.schedule(self.modality.noise, run).noise or self.modality.noise

    def schedule_and_solver(self, run: Run) -> tuple[Schedule, NoiseSchedule, Solver]:
        """What the two single hooks answer for this run, checked against the model.

        Raises:
            ConfigError: the solver does not fit the model or the number of steps.
        """
        schedule = self.plan.manager.schedule(self.modality.noise, run)
        noise = schedule.noise or self.modality.noise
        solver = self.plan.manager.solver(noise, run)
        name = str(self.plan.recipe.solver)
        active = self.plan.manager.of("solver")[0]
        if undeclared := solver.facts.words - set(active.plugin.effects):
            raise PluginError(
                f"plugin {active.entry.origin}: its solver is {', '.join(sorted(undeclared))}, but its effects do not "
                "say so, and rules would miss it; add the words to `effects`"
            )
        if solver.facts.discrete != noise.discrete:
            kind, other = ("tokens", "real vectors") if solver.facts.discrete else ("real vectors", "tokens")
            raise ConfigError(f"solver {name} steps {kind}, but the model {run.model} is over {other}")
        if run.steps < solver.facts.min_steps:
            raise ConfigError(f"solver {name} needs at least {solver.facts.min_steps} steps; got {run.steps}")
        return schedule, noise, solver

    @torch.inference_mode()
    def _sample(
        self,
        run: Run,
        request: Request,
        cond: Mapping[str, Cond],
        wraps: Sequence[Wrap],
        counter: Counter,
        on_step: Callable[[Progress], object],
        network: Network | None = None,
    ) -> tuple[Tensor, Problem]:
        """From the prior, or from the request's file, to x0 with the given wraps, first innermost.

        Raises:
            NumericsError: x0 is not finite.
        """
        schedule, noise, solver = self.schedule_and_solver(run)
        times = schedule.timesteps(noise, run.steps)
        check_timesteps(times, run.steps)
        rng = SampleRng(run.seeds)
        x = self.modality.prior(request, rng).to(self.device)
        _, guided, sampler = self._chain(run, request, noise, wraps, counter, network)
        watch = Watch()
        problem = Problem(x, times, watch.around(guided), cond, solver, noise, rng, run)
        problem = replace(problem, on_step=lambda p: on_step(replace(p, x0=watch.x0)))
        if request.init and request.init.steps(run.steps) < run.steps:
            # Anew: the file is noised with the numbers that would otherwise be the prior.
            problem = replace(problem, rng=SampleRng(run.seeds))
            x0 = self.modality.to_x0(request.init.content, request).to(self.device)
            if not is_finite(x0):
                raise ConfigError(f"--init {request.init.name} holds numbers that are NaN or infinite")
            problem = begin(problem, Start(noised(x0, self.modality.mask_token), share=request.init.strength))
        x0 = sampler(problem)
        watch.check(x0, self.dtype)
        return x0, problem

    def _chain(
        self,
        run: Run,
        request: Request,
        noise: NoiseSchedule,
        wraps: Sequence[Wrap],
        counter: Counter,
        network: Network | None = None,
    ) -> tuple[NetworkDenoiser, Denoiser, Sampler]:
        """The bare network, the guided denoiser and the sampler, with the wraps around both, first innermost."""
        bare = NetworkDenoiser(
            (network or self.network).module,
            self.modality.forward,
            noise,
            self.modality.prediction,
            DTYPES[self.dtype],
            counter,
            self.modality.mask_token,
        )
        denoiser = self.modality.denoiser(switched(bare, [e for w in wraps for e in w.experts]), request)
        for wrap in wraps:
            denoiser = wrap.denoiser(denoiser) if wrap.denoiser else denoiser
        guidance = Guidance(run.guidance, run.guidance_interval, tokens=noise.discrete)
        for wrap in wraps:
            guidance = wrap.guidance(guidance) if wrap.guidance else guidance
        guided = guidance.wrap(denoiser)
        sampler: Sampler = march
        for wrap in wraps:
            sampler = wrap.sampler(sampler) if wrap.sampler else sampler
        return bare, guided, sampler

    def _distill(
        self,
        run: Run,
        request: Request,
        wraps: Sequence[Wrap],
        counter: Counter,
        on_step: Callable[[Progress], object],
        network: Network | None = None,
    ) -> list[Distilled]:
        """The `distill` driver: one representation a prompt; see `suite.engine.score_distillation_batch`."""
        schedule, noise, solver = self.schedule_and_solver(run)

        def teacher(own: Counter) -> tuple[NetworkDenoiser, Denoiser, Sampler]:
            return self._chain(run, request, noise, wraps, own, network)

        def another() -> Modality:
            # A fresh load: the module in use may hold plugins' patches, and must come back bit for bit.
            return type(self.modality)(self.plan.folder, self.device, DTYPES[self.dtype])

        lesson = Lesson(self.modality, run, request, schedule, solver, noise, teacher, another)
        total = self.modality.work(run.steps, request.options, request.batch)
        return distill_batch(lesson, counter, lambda step: on_step(Progress(step, total)))

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num: int = 1,
        seed: int | str = 0,
        hold_seed: bool = False,
        negative: str = "",
        options: Mapping[str, Value | None] | None = None,
        init: Init | None = None,
        on_step: OnStep | None = None,
        count_macs: bool = False,
        watch_blocks: bool = False,
    ) -> Result:
        """Generate one batch: `num` samples of each prompt; sample k of them all has seed + k.

        With `hold_seed` every prompt begins at `seed` again. The seed `random` chooses one; the report says which.
        A sample depends on its prompt, its options and its seed only. `options` are those that the modality
        declares. `init` is a file to begin with, from `Engine.init`. `on_step` is called after each solver step with
        its number, and if it takes two arguments with copies of the state too, a
        `suite.diffusion.sampler.Progress`; what it raises ends the run.
        `count_macs` fills the report's `macs`, at the cost of its `seconds`, which then measure the counting.
        `watch_blocks` fills its `blocks`.

        Raises:
            ConfigError: empty prompt, an option that the modality does not take, a value of another type, the engine
                is closed or in the middle of a run of this thread.
            NoOpError: a named plugin did nothing.
            NumericsError: numbers became NaN or infinite.
            PluginError: a plugin failed.
        """
        first = seed if isinstance(seed, str) and seed == RANDOM else whole(seed, "seed", 0, MAX_SEED)
        prompts, seeds = expand(prompts_of(prompt), whole(num, "num", 1), first, hold_seed)
        return self.generate_batch(
            prompts,
            seeds,
            negative=negative,
            options=options,
            init=init,
            on_step=on_step,
            count_macs=count_macs,
            watch_blocks=watch_blocks,
        )

    def generate_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        options: Mapping[str, Value | None] | None = None,
        init: Init | None = None,
        on_step: OnStep | None = None,
        count_macs: bool = False,
        watch_blocks: bool = False,
    ) -> Result:
        """Generate sample i from prompts[i] and seeds[i], all in one batch; see `generate`."""
        prompts = prompts_of(prompts)
        seeds = seeds_of(seeds, len(prompts))
        request = self.request(prompts, negative, options, init)
        with self._busy():
            return self._generate(request, seeds, _shown(on_step), count_macs, watch_blocks)

    def _generate(
        self,
        request: Request,
        seeds: Sequence[int],
        on_step: Callable[[Progress], object],
        count_macs: bool,
        watch_blocks: bool,
    ) -> Result:
        self.modality.check(self.plan.folder, request)
        run = self._run(request, seeds)
        clock = Clock()
        cond, reused = self._encoded.of(request, self.modality.encode)
        clock.lap("encode")
        counter, network, problem = Counter(), self.network, None
        activity = Activity.of(network, self._grid(run)) if watch_blocks else None
        caches: list[Link] = [(None, Wrap(report=lambda: _unused(), undo=activity.undo))] if activity else []
        with undone(network.module, caches, self.plan.manager.active):
            if activity:
                activity.install()
            noise = self._noise(run)
            for active in self.plan.manager.of("cache"):
                network = self._install(active, run, network, noise, caches)
            chain = [*self._loaded, *((a, w) for a, w in caches if a)]
            memory = CacheMemory.of({a.text: w for a, w in caches if a}, self.plan.cache_limit, self.device)
            wraps = [w for _, w in chain if w] + memory.wraps()
            wraps += [activity.wrap()] if activity else []
            with attributed(None, "", self.plan.manager.active), ExitStack() as stack:
                macs = stack.enter_context(counting()) if count_macs else None
                if self.modality.driver == "distill":
                    content = self._distill(run, request, wraps, counter, on_step, network)
                else:
                    content, problem = self._sample(run, request, cond, wraps, counter, on_step, network)
                counted = macs() / request.batch if macs else None
            self._add_up(counter)
            clock.lap("sample")
        artifacts = self.modality.decode(content, request)
        clock.lap("decode")
        # Where the request leaves no step, nobody can have done anything.
        idle = problem is not None and problem.run.steps == 0
        plugins = plugin_reports(self.plan.manager.active, {id(a): w for a, w in chain}, self.plan.allow_noop or idle)
        encoding = {"reused": reused, "bytes_held": self._encoded.bytes}
        report = self._report(run, request, counter, clock.laps, plugins, counted, problem, encoding)
        report = replace(report, cache_memory=memory.facts(), blocks=activity.facts() if activity else None)
        empty = [f"sample {k} is empty: {why}" for k, a in enumerate(artifacts) if (why := self.modality.why_empty(a))]
        told = [*report.warnings, *self.modality.warnings(self.plan.folder, request), *empty]
        report = replace(report, warnings=list(dict.fromkeys(told)))
        stopped = isinstance(content, list) and not (len(content) == request.batch and content[-1].complete)
        return Result(artifacts, report, self.modality, stopped, content)

    def _add_up(self, counter: Counter) -> None:
        """Evaluations of all ranks: `nfe` is their sum, `depth` the longest."""
        if self.mesh.size > 1:
            mine = torch.tensor([counter.nfe, float(counter.depth)], device=self.device)
            every = torch.stack(self.mesh.all_gather(mine))
            counter.nfe, counter.depth = float(every[:, 0].sum()), int(every[:, 1].max())

    def stream(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 8, **options: Any
    ) -> Iterator[Result]:
        """`generate_batch` over chunks, so that finished samples are safe before the next chunk starts."""
        for start in range(0, len(prompts), batch):
            stop = start + batch
            yield self.generate_batch(prompts[start:stop], seeds[start:stop], **options)

    def _report(
        self,
        run: Run,
        request: Request,
        counter: Counter,
        laps: Mapping[str, float],
        plugins: Sequence[PluginReport],
        macs: float | None,
        problem: Problem | None,
        encoding: Mapping[str, Any],
    ) -> RunReport:
        return RunReport(
            modality=run.modality,
            model=run.model,
            model_hash=self.plan.folder.hash,
            prompts=list(request.prompts),
            seeds=list(run.seeds),
            recipe=self.plan.recipe.to_dict(),
            device=self.device,
            dtype=self.dtype,
            threads=torch.get_num_threads(),
            world=run.world,
            steps=problem.run.steps if problem else run.steps,
            nfe=counter.nfe,
            depth=counter.depth,
            macs=macs,
            seconds={"load": round(self._load_seconds, 4), **{k: round(v, 4) for k, v in laps.items()}},
            network_bytes=self.network.bytes(),
            peak_memory_bytes=peak_memory(self.device),
            plugins=plugins,
            warnings=list(self.plan.warnings_for(request.negative)),
            versions=versions("efficient-diffusion-suite", "torch", "diffusers", "transformers"),
            negative=request.negative,
            options=dict(request.options),
            start=started(request.init, run, problem) if request.init and problem else None,
            encoding=encoding,
        )


def stamp(plan: Plan, dtype: str) -> str:
    """A digest of the weights and of what the recipe does, without the plugins that only store trajectories."""
    recipe = plan.recipe
    acting = [f"{a.hook} {a.text}" for a in plan.manager.active if "trajectory-store" not in a.plugin.effects]
    facts = [plan.folder.hash, dtype, recipe.steps, recipe.guidance, list(recipe.guidance_interval or ()), acting]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shown(on_step: OnStep | None) -> Callable[[Progress], object]:
    """A caller's callback as the host calls it: with the number, and with copies of the state if it takes two."""
    if on_step is None:
        return lambda progress: None
    if not callable(on_step):
        raise ConfigError(f"on_step: expected a function of the step, got {type(on_step).__name__}")
    try:
        required = [
            p
            for p in inspect.signature(on_step).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
    except ValueError:  # written in C
        required = []
    told: Any = on_step

    def show(progress: Progress) -> None:
        with torch.inference_mode(False):  # the caller's own work, on copies: nothing there changes the run
            if len(required) < 2:
                told(progress.step)
            else:
                x, x0 = (v if v is None else v.clone() for v in (progress.x, progress.x0))
                told(progress.step, replace(progress, x=x, x0=x0))

    return show


def _unused() -> Any:
    raise AssertionError("the recorder's report is never asked for")


__all__ = ["Engine", "Result", "expand"]
