"""Checks of the hook `schedule`."""

from __future__ import annotations

import torch

from suite.diffusion.noise import NoiseSchedule
from suite.diffusion.schedule import Schedule, check_timesteps
from suite.errors import ConfigError
from suite.testing.checks.subject import CONTINUOUS, DISCRETE, Subject, of


def _schedules(subject: Subject, steps: int) -> list[tuple[NoiseSchedule, Schedule]]:
    """Those it makes: for all families of real-valued noise or for none of them, and for tokens if it can.

    A grid that was fitted to one model may refuse all but its own noise and number of steps.
    """
    made, refused = [], []
    for noise in (*CONTINUOUS, *DISCRETE):
        try:
            made.append((noise, subject.schedule(noise, steps)))
        except ConfigError as error:
            refused.append((noise, error))
    if _fitted(subject):
        return made
    assert made, f"it refuses every noise schedule; the last: {refused[-1][1]}"
    if any(not noise.discrete for noise, _ in made):
        families = [f"{noise.family} ({error})" for noise, error in refused if not noise.discrete]
        assert not families, f"it serves some real-valued noise but refuses {families[0]}"
    return made


def _fitted(subject: Subject) -> bool:
    return "optimised-grid" in subject.plugin.effects


def _some_schedules(subject: Subject) -> tuple[int, list[tuple[NoiseSchedule, Schedule]]]:
    """(steps, schedules): of 7 steps, or of the first number that a fitted grid serves."""
    for steps in (7, *range(1, 51)):
        if made := _schedules(subject, steps):
            return steps, made
    raise AssertionError("it serves no noise schedule at any number of steps from 1 to 50")


@of("schedule")
def check_schedule_times(subject: Subject) -> None:
    """steps + 1 float64 times, strictly decreasing from 1 to 0, for 1 to 50 steps of every family."""
    _some_schedules(subject)
    for steps in range(1, 51):
        for noise, schedule in _schedules(subject, steps):
            times = schedule.timesteps(noise, steps)
            assert times.dtype is torch.float64, f"{noise.family}: times are {times.dtype}, expected float64"
            try:
                check_timesteps(times, steps)
            except ConfigError as error:
                raise AssertionError(f"{noise.family}, {steps} steps: {error}") from error
            if times.ndim == 1:
                assert (times[1:] < times[:-1]).all(), f"{noise.family}, {steps} steps: two times are equal"


@of("schedule")
def check_schedule_is_a_value(subject: Subject) -> None:
    """Asking twice gives the same times."""
    steps, schedules = _some_schedules(subject)
    for noise, schedule in schedules:
        first = schedule.timesteps(noise, steps).clone()
        if not _fitted(subject):
            schedule.timesteps(noise, 3)
        assert torch.equal(first, schedule.timesteps(noise, steps)), f"{noise.family}: the second answer differs"


@of("schedule")
def check_schedule_training_times(subject: Subject) -> None:
    """Training times are in [0, 1] and depend on the generator alone."""
    for noise, schedule in _some_schedules(subject)[1]:
        one, two = (schedule.training_times(64, torch.Generator().manual_seed(3)) for _ in range(2))
        assert one.shape[0] == 64, f"{noise.family}: {tuple(one.shape)} training times for a batch of 64"
        assert ((one >= 0) & (one <= 1)).all(), f"{noise.family}: training times outside [0, 1]"
        assert torch.equal(one, two), f"{noise.family}: equal generators give different training times"
