"""What a caller in Python may hand over, what the engine makes of its surroundings, and what it hands back."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from suite import Engine
from suite.diffusion.sampler import Progress
from suite.diffusion.start import Init
from suite.engine.engine import Result
from suite.errors import ConfigError
from suite.host.models import ModelFolder
from suite.observe.report import RunReport
from suite.testing.engine import rows_of, tiny_engine

Refused = tuple[Callable[[Any], object], str]  # what is given is of the wrong type on purpose


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as opened:
        yield opened


def made(engine: Engine, **more: Any) -> Tensor:
    given: Any = {"seed": 5, "num": 2} | more
    return rows_of(engine.generate("a red apple", **given).artifacts)


@pytest.mark.parametrize(
    "seed", [np.int64(5), np.uint8(5), torch.tensor(5), np.array(5)], ids=["int64", "uint8", "tensor", "array"]
)
def test_whole_numbers_of_any_library(engine: Engine, seed: Any) -> None:
    assert torch.equal(made(engine, seed=seed, num=np.int32(2)), made(engine))
    seeds: Any = np.arange(2) + 5
    report = engine.generate_batch(("a", "b"), seeds).report
    assert report.seeds == [5, 6] and all(type(s) is int for s in report.seeds)


@pytest.mark.parametrize(
    "prompts", [("a", "b"), ["a", "b"], (p for p in "ab"), np.array(["a", "b"]), {"a": 0, "b": 1}.keys()]
)
def test_prompts_of_any_iterable(engine: Engine, prompts: Any) -> None:
    report = engine.generate(prompts).report
    assert report.prompts == ["a", "b"] and all(type(p) is str for p in report.prompts)


TOO_MUCH = 2**63
REFUSED: dict[str, Refused] = {
    "true as seed": (lambda e: e.generate("a", seed=True), "seed = True: expected a whole number from 0"),
    "numpy's true": (lambda e: e.generate("a", seed=np.True_), "expected a whole number"),
    "float seed": (lambda e: e.generate("a", seed=1.0), "seed = 1.0: expected a whole number"),
    "text seed": (lambda e: e.generate("a", seed="1"), "seed = '1': expected a whole number"),
    "no seed": (lambda e: e.generate("a", seed=None), "seed = None: expected a whole number"),
    "fraction": (lambda e: e.generate("a", seed=Fraction(3, 1)), "expected a whole number"),
    "seed below": (lambda e: e.generate("a", seed=-1), "seed = -1: expected a whole number from 0"),
    "seed above": (lambda e: e.generate("a", seed=TOO_MUCH), "expected a whole number from 0"),
    "seed above in a batch": (lambda e: e.generate_batch(["a"], [TOO_MUCH]), r"seeds\[0\] = 9223372036854775808: exp"),
    "num of none": (lambda e: e.generate("a", num=0), "num = 0: expected a whole number from 1"),
    "num": (lambda e: e.generate("a", num=1.5), "num = 1.5: expected a whole number from 1"),
    "num true": (lambda e: e.generate("a", num=True), "num = True: expected"),
    "more seeds": (lambda e: e.generate_batch(["a"], [1, 2]), "2 seeds for 1 prompts"),
    "fewer seeds": (lambda e: e.generate_batch(["a", "b"], [1]), "1 seeds for 2 prompts"),
    "one seed": (lambda e: e.generate_batch(["a"], 1), "seeds = 1: expected a list of 1 whole numbers"),
    "text seeds": (lambda e: e.generate_batch(["a"], "1"), "expected a list of 1 whole numbers"),
    "true in seeds": (lambda e: e.generate_batch(["a"], [True]), r"seeds\[0\] = True"),
    "no prompts": (lambda e: e.generate([]), "the prompt is empty"),
    "no prompts in a batch": (lambda e: e.generate_batch([], []), "the prompt is empty"),
    "empty generator": (lambda e: e.generate(p for p in ()), "the prompt is empty"),
    "blank": (lambda e: e.generate(["a", " "]), "the prompt is empty"),
    "number as prompt": (lambda e: e.generate(5), "prompt = 5: expected a text, or a list"),
    "None as prompt": (lambda e: e.generate(None), "prompt = None: expected a text"),
    "bytes as prompt": (lambda e: e.generate(b"apple"), "prompt = b'apple': expected a text"),
    "number among prompts": (lambda e: e.generate(["a", 5]), "prompt 1 = 5: expected a text, got int"),
    "negative": (lambda e: e.generate("a", negative=None), "negative = None: expected a text"),
    "options": (lambda e: e.generate("a", options=[1]), "options: expected a mapping"),
    "unknown option": (lambda e: e.generate("a", options={"frames": 4}), "no option 'frames'"),
    "init": (lambda e: e.generate("a", init="apple.png"), r"init: expected what engine.init\(FILE\) returns, got str"),
    "init of another": (
        lambda e: e.generate("a", init=Init(None, "x.wav", "", modality="audio")),
        "x.wav was read for the modality audio; this engine makes tiny",
    ),
    "callback": (lambda e: e.generate("a", on_step=3), "on_step: expected a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_another_kind_is_refused_and_said(engine: Engine, name: str) -> None:
    use, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as raised:
        use(engine)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("toaster", "expected cpu, cuda, cuda:N or mps"),
        ("meta", "expected cpu, cuda, cuda:N or mps"),
        ("", "expected cpu"),
        (0, "device 0: expected a text"),
        ("cuda:77", "is not here"),
        ("mps", "is not here"),
    ],
)
def test_a_device_that_is_not_here(device: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine.from_recipe("fast", device=device)


def test_a_torch_device_is_a_device(engine: Engine) -> None:
    with Engine(engine.plan, torch.device("cpu")) as other:  # pyright: ignore[reportArgumentType]
        assert other.device == "cpu" and torch.equal(made(other), made(engine))


def test_the_last_seed(engine: Engine) -> None:
    assert engine.generate_batch(["a"], [2**63 - 1]).report.seeds == [2**63 - 1]


# ---- surroundings ----------------------------------------------------------------------------------------------


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad off": lambda: torch.set_grad_enabled(False),
    "float64": default_dtype,
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


def state() -> dict[str, Any]:
    """Everything of the process and the thread that a run might leave otherwise."""
    memory: Any = torch.utils.deterministic
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": memory.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch's numbers": torch.get_rng_state().tolist(),
        "numpy's numbers": str(np.random.get_state()),
        "python's numbers": random.getstate(),
    }


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("loaded", ["before", "inside"])
def test_what_the_caller_has_set_makes_no_difference_and_stays(engine: Engine, name: str, loaded: str) -> None:
    expected = made(engine)
    with SURROUNDINGS[name]():
        before = state()
        used = engine if loaded == "before" else tiny_engine()
        got = made(used)
        assert state() == before
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(made(used), expected)  # what was kept in there serves outside too


def test_distillation_has_its_gradients_wherever_it_is_called() -> None:
    quick = {"iterations": 2, "views": 1, "resolution": 24, "refine": 2}

    def made(engine: Engine) -> Any:
        return engine.generate("a red apple", options=quick).artifacts[0].mesh

    with Engine.from_recipe(modality="3d", model="emoji-unet-32") as engine:
        expected = made(engine)
        with ExitStack() as stack:
            for name in ("float64", "default device", "autocast", "no_grad", "inference_mode"):
                stack.enter_context(SURROUNDINGS[name]())
            before = state()
            got = made(engine)
            assert state() == before
    assert np.array_equal(got.vertices, expected.vertices) and np.array_equal(got.faces, expected.faces)
    assert np.array_equal(got.visual.vertex_colors, expected.visual.vertex_colors)


def test_nothing_is_drawn_from_the_global_streams() -> None:
    before = state()
    with Engine.from_recipe({"steps": 2}, model="emoji-unet-32") as engine:
        assert state() == before
        engine.generate("a red apple")
        assert state() == before


# ---- callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["transformer", "tokens"])
def test_a_callback_of_two_is_shown_copies_of_the_state(network: str) -> None:
    with tiny_engine(network) as engine:
        plain = engine.generate("a", num=2)
        seen: list[tuple[int, Progress]] = []

        def spoil(step: int, progress: Progress) -> None:
            assert progress.x is not None and progress.x0 is not None
            seen.append((step, Progress(step, progress.steps, progress.t, progress.x.clone(), progress.x0.clone())))
            progress.x.zero_()
            progress.x0.zero_()
            with pytest.raises(FrozenInstanceError):
                progress.t = 0.0  # pyright: ignore[reportAttributeAccessIssue]

        again = engine.generate("a", num=2, on_step=spoil)
    assert torch.equal(rows_of(again.artifacts), rows_of(plain.artifacts))
    assert [step for step, _ in seen] == [p.step for _, p in seen] == list(range(11))
    times = [p.t for _, p in seen]
    assert times == pytest.approx([1 - (k + 1) / 11 for k in range(11)]) and {p.steps for _, p in seen} == {11}
    last = seen[-1][1]
    assert last.x is not None and last.x0 is not None
    assert torch.equal(last.x, plain.content) and not last.x.is_inference()
    if network == "transformer":  # Euler's last step ends at the estimate
        assert torch.allclose(last.x0, plain.content, atol=1e-6)
    else:
        assert torch.allclose(last.x0.sum(-1), torch.ones(last.x0.shape[:-1]))


def test_a_callback_of_one_is_told_the_number(engine: Engine) -> None:
    class Both:
        def method(self, step: int, more: int = 0) -> None:
            assert more == 0
            steps.append(step)

    steps: list[int] = []
    for tell in (lambda step: steps.append(step), Both().method, steps.append):
        engine.generate("a", on_step=tell)
        assert steps == list(range(11))
        steps.clear()


@pytest.mark.parametrize("solver", ["euler", "heun", "pndm"])
def test_what_a_callback_raises_ends_the_run(solver: str) -> None:
    def stop(step: int, progress: Progress) -> None:
        raise LookupError("seen enough")

    with tiny_engine(solver=solver, cache=["fora:interval=2"]) as engine:
        before = made(engine)
        with pytest.raises(LookupError, match="seen enough"):
            engine.generate("a", on_step=stop)
        assert torch.equal(made(engine), before)


def test_a_callback_of_two_in_distillation(tmp_path: Path) -> None:
    seen: list[Any] = []
    with Engine.from_recipe(modality="3d", model="emoji-unet-32") as engine:
        engine.generate(
            ["a red apple", "a blue heart"],
            options={"iterations": 2, "views": 1, "resolution": 24, "refine": 0},
            on_step=lambda step, progress: seen.append((step, progress)),
        )
    assert seen == [(step, Progress(step, 4)) for step in range(4)]


# ---- pickles ---------------------------------------------------------------------------------------------------


def test_an_engine_says_why_it_is_not_pickled(engine: Engine) -> None:
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"Engine holds a loaded model.*from_recipe"):
            use(engine)


def test_a_result_is_pickled_without_its_model_and_can_be_saved(tmp_path: Path) -> None:
    with Engine.from_recipe({"steps": 2}, model="emoji-unet-32") as engine:
        result = engine.generate("a red apple", num=2)
    data = pickle.dumps(result)
    assert len(data) < 200_000
    for again in (pickle.loads(data), copy.copy(result), copy.deepcopy(result)):
        assert again.report == result.report and torch.equal(again.content, result.content)
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
        one, two = again.save(tmp_path / "a" / "x.png")
        other, last = result.save(tmp_path / "b" / "x.png")
        assert (one.read_bytes(), two.read_bytes()) == (other.read_bytes(), last.read_bytes())
        assert not hasattr(again, "nothing") and not hasattr(again.modality, "network")


def artifact(modality: str) -> Any:
    if modality == "image":
        return Image.new("RGB", (4, 4), "red")
    if modality == "video":
        from suite.modalities.video.files import Clip

        return Clip(np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8), 255, np.uint8), 8.0)
    if modality == "audio":
        from suite.modalities.audio.files import Sound

        return Sound(np.full(1600, 0.5, np.float32), 16000)
    if modality == "3d":
        import trimesh

        from suite.modalities.three_d import Solid

        return Solid(trimesh.creation.icosphere(1), Image.new("RGB", (4, 4)), [], [{"t": 1.0}])
    return "a red apple ."


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("image", "x.png"), ("video", "x.gif"), ("audio", "x.wav"), ("3d", "x.ply"), ("text", "x.txt"),
        ("text", "x.jsonl"),
    ],
)  # fmt: skip
def test_results_of_every_modality_are_saved_without_a_model(
    engine: Engine, tmp_path: Path, modality: str, name: str
) -> None:
    report: Any = engine.generate("a").report
    report = RunReport(**{**report.__dict__, "modality": modality})
    again = pickle.loads(pickle.dumps(Result([artifact(modality)], report, engine.modality)))
    assert (tmp_path / name) in again.save(tmp_path / name)
    assert type(again.modality).name == modality


def test_a_plan_is_what_can_be_handed_over(engine: Engine) -> None:
    assert isinstance(engine.plan.folder, ModelFolder)
    with pytest.raises(TypeError, match="from_recipe"):
        pickle.dumps({"engine": engine})
