"""How a scheduler of diffusers is given our noise schedule and our grid, and driven step by step.

A scheduler owns its grid: it picks `n` entries of a table of T betas. Given a table that has just the n times of our
grid, it has nothing left to pick. Its table is of alpha_bar = alpha^2 / (alpha^2 + sigma^2), so a schedule of any
family becomes the variance-preserving one of equal log-SNR, whose state is x / sqrt(alpha^2 + sigma^2). Schedulers
of flow matching take the grid as sigma / (alpha + sigma) with the state x / (alpha + sigma) instead.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.prediction import Prediction, from_x0
from suite.diffusion.rng import SampleRng
from suite.diffusion.solver import Denoise
from suite.errors import ConfigError
from suite.host.suggest import nearest

#: What diffusers puts in the place of alpha_bar = 0 (`rescale_betas_zero_snr`): sigma / alpha must be finite.
LEAST = 2.0**-24
#: Closer to 1 than this alpha_bar has no noise that its schedulers could divide by.
MOST = 1 - 2.0**-50
Coordinates = Literal["vp", "flow"]
#: Classes that are refused although they take a table, and why.
REFUSED = {
    "CogVideoXDPMScheduler": "its step wants the estimate of the step before as an argument",
    "DDIMInverseScheduler": "it goes from data to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise",
    "IPNDMScheduler": "it has a noise schedule of its own; --solver pndm:start=lower-order is the method",
    "LCMScheduler": "it reckons with the numbers of trained timesteps; --solver lcm is the method",
    "RePaintScheduler": "it wants a picture to paint into",
    "TCDScheduler": "it reckons with the numbers of trained timesteps; --solver tcd is the method",
}


def classes() -> dict[str, type]:
    """The scheduler classes that can be wrapped, by name."""
    from diffusers import schedulers

    found = {}
    for name in dir(schedulers):
        cls: Any = getattr(schedulers, name) if name.endswith("Scheduler") else None
        # Its own stand-ins for classes whose library is missing are none of its schedulers.
        plain = isinstance(cls, type) and issubclass(cls, schedulers.SchedulerMixin) and name not in REFUSED
        if plain and coordinates(cls):
            found[name] = cls
    return found


def coordinates(cls: type) -> Coordinates | None:
    """In which coordinates a scheduler can be given our noise; None if in none."""
    known = inspect.signature(cls.__init__).parameters
    if "trained_betas" in known:
        return "vp"
    steps = inspect.signature(getattr(cls, "set_timesteps", lambda: None)).parameters
    return "flow" if cls.__name__.startswith("FlowMatch") and "sigmas" in steps else None


def find(name: str, config: Mapping[str, str]) -> type:
    """The class of this name, which must have these options.

    Raises:
        ConfigError: there is none, it cannot be wrapped, or it lacks an option.
    """
    from diffusers import schedulers

    known = classes()
    if name not in known:
        if isinstance(getattr(schedulers, name, None), type):
            why = REFUSED.get(name, "it cannot be given our noise schedule: no trained_betas, no sigmas")
            raise ConfigError(f"diffusers: {name}: {why}; those that can: {', '.join(known)}")
        hint = nearest(name, known) or f"; it has {', '.join(known)}"
        raise ConfigError(f"diffusers: no scheduler {name!r}{hint}")
    options = set(inspect.signature(known[name].__init__).parameters) - {"self"}
    for key in config:
        if key not in options:
            hint = nearest(key, options) or f"; its options: {', '.join(sorted(options))}"
            raise ConfigError(f"diffusers: {name} has no option {key!r}{hint}")
    return known[name]


def value_of(text: str) -> Any:
    """An option's value from text: a number, a truth value, none, or the text itself."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Driven:
    """A scheduler with its grid set, and how our step relates to its own.

    Attributes:
        scheduler: never changed in place; each step works on a copy.
        times: our grid, float64 [n + 1].
        plan: for each of our steps the indices of its timesteps, each with one evaluation.
        kind: what the scheduler wants to be told.
        scaled: its state is x / alpha rather than x.
    """

    scheduler: Any
    times: Tensor
    plan: tuple[tuple[int, ...], ...]
    kind: Prediction
    space: Coordinates
    scaled: bool


def prepare(name: str, config: Mapping[str, str], noise: NoiseSchedule, times: Tensor) -> Driven:
    """A scheduler on our grid.

    Raises:
        ConfigError: a grid that it cannot take; see also `find`.
    """
    cls = find(name, config)
    if times.ndim != 1:
        raise ConfigError(f"diffusers: {name} has one time for all; this grid has {times[0].numel()} a sample")
    options, space = {k: value_of(v) for k, v in config.items()}, coordinates(cls)
    try:
        with np.errstate(all="ignore"):  # constructors try out a grid of their own, in single precision
            if space == "flow":
                scheduler: Any = cls(**options)
                kind = Prediction.FLOW
                _set_flow(scheduler, noise, times)
            else:
                scheduler, kind = _with_table(cls, options, noise, times)
    except ConfigError:
        raise
    except Exception as error:  # whatever a scheduler objects to: its own words say it best
        raise ConfigError(f"diffusers: {name} does not take this grid of {len(times) - 1} steps: {error}") from error
    plan = _plan(name, len(times) - 1, len(scheduler.timesteps))
    assert space
    scaled = space == "vp" and _scales(scheduler)
    return Driven(scheduler, times, plan, kind, space, scaled)


def _bars(noise: NoiseSchedule, times: Tensor) -> Tensor:
    """alpha^2 / (alpha^2 + sigma^2), below 1 but where there is no noise at all."""
    bars = torch.sigmoid(noise.log_snr(times))
    return bars.clamp(max=MOST).where(noise.sigma(times) > 0, bars)


def _with_table(cls: type, options: dict[str, Any], noise: NoiseSchedule, times: Tensor) -> tuple[Any, Prediction]:
    known = inspect.signature(cls.__init__).parameters
    steps = len(times) - 1
    bars = _bars(noise, times).flip(0)  # data first, as tables are
    betas = 1 - bars[1:] / bars[:-1].clamp(min=LEAST)
    wanted: dict[str, Any] = {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "steps_offset": 0,
        "clip_sample": False,
        "skip_prk_steps": True,  # the stops of its Runge-Kutta steps are between the entries of the table
        "set_alpha_to_one": True,
        "original_inference_steps": steps,
        "final_sigmas_type": "zero",
        "timestep_spacing": "trailing",
    }
    chosen = {k: v for k, v in wanted.items() if k in known} | options
    scheduler: Any = None
    for kind in (Prediction.SAMPLE, Prediction.EPSILON):
        settled = Prediction.named(chosen.get("prediction_type", kind))
        prediction = {"prediction_type": str(settled)} if "prediction_type" in known else {}
        scheduler = cls(**(chosen | prediction))
        kind = settled if prediction else Prediction.EPSILON
        # The table in double precision, with the entries themselves instead of products of betas.
        table = bars[1:]
        if kind is Prediction.EPSILON or hasattr(scheduler, "sigmas"):
            table = table.clamp(min=LEAST)  # epsilon says nothing of x0 where alpha = 0
        scheduler.alphas_cumprod = table
        if hasattr(scheduler, "alpha_t"):
            scheduler.alpha_t, scheduler.sigma_t = table.sqrt(), (1 - table).sqrt()
            scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
        if hasattr(scheduler, "final_alpha_cumprod"):
            scheduler.final_alpha_cumprod = bars[0]
        scheduler.set_timesteps(steps)
        if kind is Prediction.EPSILON or _takes(scheduler, kind):
            break
    clean = bool(bars[0] == 1)
    if not clean:
        # KDPM2 has a second table, of the stops inside its steps, which ends at clean data.
        if getattr(scheduler, "sigmas", None) is not None and not hasattr(scheduler, "sigmas_interpol"):
            scheduler.sigmas[-1] = (1 / bars[0] - 1).sqrt()
        elif not hasattr(scheduler, "final_alpha_cumprod"):
            raise ConfigError(f"diffusers: {cls.__name__} ends at clean data; this grid ends at t = {float(times[-1])}")
    return scheduler, kind


def _takes(scheduler: Any, kind: Prediction) -> bool:
    """Whether a step with this kind of output goes through; some classes list a kind that they do not implement."""
    trial = copy.deepcopy(scheduler)
    x = torch.zeros(1, 1)
    try:
        trial.scale_model_input(x, trial.timesteps[0])
        trial.step(x, trial.timesteps[0], x)
    except (NotImplementedError, ValueError):
        return False
    return str(kind) == trial.config.prediction_type


def _set_flow(scheduler: Any, noise: NoiseSchedule, times: Tensor) -> None:
    alpha, sigma = noise.alpha(times), noise.sigma(times)
    sigmas = sigma / (alpha + sigma)
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
    # A shift that it has by default is no part of our grid.
    scheduler.sigmas = sigmas.float()
    scheduler.timesteps = sigmas[:-1].float() * scheduler.config.num_train_timesteps


def _plan(name: str, steps: int, timesteps: int) -> tuple[tuple[int, ...], ...]:
    if timesteps == steps:
        return tuple((k,) for k in range(steps))
    if timesteps == 2 * steps - 1:  # each stop but the first twice
        return tuple((2 * k, 2 * k + 1) if k < steps - 1 else (2 * k,) for k in range(steps))
    if timesteps == steps + 1:  # the first step again, with the slope at its end
        return ((0, 1), *((k + 1,) for k in range(1, steps)))
    raise ConfigError(
        f"diffusers: {name} makes {timesteps} evaluations of a grid of {steps} steps; we know n, n + 1, 2n - 1"
    )


def _scales(scheduler: Any) -> bool:
    trial, one = copy.deepcopy(scheduler), torch.ones(1, 1)
    return not torch.equal(trial.scale_model_input(one, trial.timesteps[0]), one)


def advance(
    driven: Driven, noise: NoiseSchedule, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, rng: SampleRng, extra: Any
) -> tuple[Tensor, Driven]:
    """One of our steps, which may be several of theirs."""
    index = int((driven.times[:-1] - t.max()).abs().argmin())
    scheduler = copy.deepcopy(driven.scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    more = {k: v for k, v in (extra | {"generator": rng.generators}).items() if k in accepted}
    y = x / _factor(driven, noise, t)
    for position in driven.plan[index]:
        timestep = scheduler.timesteps[position]
        u = _time(driven, noise, timestep, position)
        told = scheduler.scale_model_input(y, timestep) if driven.space == "vp" else y
        scale = _size(driven, noise, u)
        x0 = denoise((told * scale).to(x.dtype), u)
        alpha, sigma = (value / scale for value in (noise.alpha(u), noise.sigma(u)))
        if driven.kind is Prediction.EPSILON and float(alpha) == 0:
            alpha, sigma = alpha + LEAST**0.5, sigma
        output = from_x0(driven.kind, x0, told.to(x0), alpha, sigma)
        y = scheduler.step(output, timestep, y, **more).prev_sample
    return (y * _factor(driven, noise, s)).to(x.dtype), Driven(**{**driven.__dict__, "scheduler": scheduler})


def _size(driven: Driven, noise: NoiseSchedule, t: Tensor) -> Tensor:
    """What our x is larger by than the x of the scheduler's own family."""
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    return alpha + sigma if driven.space == "flow" else (alpha**2 + sigma**2).sqrt()


def _factor(driven: Driven, noise: NoiseSchedule, t: Tensor) -> Tensor:
    """What our x is larger by than the scheduler's state."""
    if not driven.scaled:
        return _size(driven, noise, t)
    # x / alpha; where alpha = 0, the table's own smallest.
    return _size(driven, noise, t) * _bars(noise, t).clamp(min=LEAST).sqrt()


def _time(driven: Driven, noise: NoiseSchedule, timestep: Tensor, position: int) -> Tensor:
    """Our time of a timestep: an entry of the table, or between two of them, evenly in log-SNR."""
    steps = len(driven.times) - 1
    if driven.space == "flow":
        return driven.times[position]
    place = steps - 1 - float(timestep)
    near = min(max(round(place), 0), steps)
    if abs(place - near) < 1e-5:
        return driven.times[near]
    left = min(max(int(place), 0), steps - 1)
    low, high = noise.log_snr(driven.times[left]), noise.log_snr(driven.times[left + 1])
    return noise.time_at(low + (place - left) * (high - low))
