"""Caches across requests: what is resumed, what it costs, and that a store is never believed when it should not be."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import Engine
from suite.diffusion.denoiser import Counter
from suite.diffusion.guidance import Guidance
from suite.diffusion.rng import SampleRng
from suite.diffusion.sampler import Problem, march, some
from suite.errors import ConfigError, RuleError
from suite.host.plan import make_plan
from suite.plugin import Plugin, build
from suite.plugins.cache._store import Store, evicted
from suite.plugins.cache.nirvana import Nirvana, entry_name, named, prompt_vectors
from suite.plugins.cache.redi import ReDi
from suite.plugins.solvers.ancestral import Ancestral
from suite.plugins.solvers.ddim import DDIM
from suite.rules import Member, check
from suite.testing.tiny import Tiny
from suite.wrap import Wrap, WrapReport

STEPS = 10
TINY = Tiny.build()


def problem(
    seeds: tuple[int, ...], prompts: tuple[Tensor, ...], solver: Plugin, counter: Counter, **run: Any
) -> Problem:
    """Prompts are the token states of one row each, [5, 16]."""
    facts = TINY.run(seeds, steps=run.pop("steps", STEPS), guidance=2.0, stamp="weights", **run)
    cond = TINY.cond(seeds)
    mine = {**cond["cond"], "encoder_hidden_states": torch.stack(prompts)}
    guided = Guidance(2.0).wrap(TINY.denoiser(None, counter))
    times = torch.linspace(1, 0, facts.steps + 1, dtype=torch.float64)
    made: Any = solver.solver(TINY.noise, facts)
    return Problem(TINY.prior(seeds), times, guided, {**cond, "cond": mine}, made, TINY.noise, drawn(seeds), facts)


def drawn(seeds: tuple[int, ...]) -> SampleRng:
    """Streams from which the prior has been drawn, as the engine's are."""
    rng = SampleRng(seeds)
    rng.normal((4, 8, 8))
    return rng


def prompt(seed: int, near: Tensor | None = None, cosine: float = 1.0) -> Tensor:
    """Token states; with `near` those whose mean has this cosine with it."""
    fresh = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
    if near is None:
        return fresh
    a = near.mean(0) / near.mean(0).norm()
    b = fresh.mean(0)
    b = b - (b @ a) * a
    return (cosine * a + (1 - cosine**2) ** 0.5 * b / b.norm()).expand(5, 16).clone()


def run(
    plugin: Plugin | None,
    prompts: tuple[Tensor, ...],
    seeds: tuple[int, ...] = (0,),
    solver: Plugin | None = None,
    **facts: Any,
) -> tuple[Tensor, WrapReport | None, Counter]:
    counter = Counter()
    asked = problem(seeds, prompts, solver or DDIM(), counter, **facts)
    wrap: Wrap | None = plugin.cache(asked.run) if plugin else None
    sampler = wrap.sampler(march) if wrap and wrap.sampler else march
    with torch.inference_mode():
        out = sampler(asked)
    return out, wrap.report() if wrap else None, counter


def nirvana(folder: Path, **options: Any) -> Nirvana:
    return Nirvana(str(folder / "store"), **options)


def redi(folder: Path, **options: Any) -> ReDi:
    return ReDi(str(folder / "store"), **options)


# ---- nirvana -----------------------------------------------------------------------------------


def test_an_empty_store_changes_nothing_and_is_filled(tmp_path: Path) -> None:
    plain, _, _ = run(None, (prompt(0),))
    out, report, counter = run(nirvana(tmp_path), (prompt(0),))
    assert torch.equal(out, plain) and counter.nfe == 2 * STEPS
    assert report and (report.did, report.facts["skipped"], report.facts["stored"]) == (5, 0, 5)
    files = list((tmp_path / "store").glob("*/*.safetensors"))
    assert sorted(named(f.name.removesuffix(".safetensors"))[1] for f in files) == [1, 2, 3, 4, 5]
    assert report.facts["bytes_held"] == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=0.7), Ancestral()], ids=["ddim", "ddim-eta", "ancestral"])
def test_the_same_prompt_and_seed_resumes_bit_for_bit(solver: Plugin, tmp_path: Path) -> None:
    """Also where the solver draws noise: the stream goes on where it was."""
    plain, _, _ = run(None, (prompt(0),), solver=solver)
    run(nirvana(tmp_path), (prompt(0),), solver=solver)
    out, report, counter = run(nirvana(tmp_path), (prompt(0),), solver=solver)
    assert torch.equal(out, plain)
    assert counter.nfe == 2 * (STEPS - 5) and report and report.facts["resumed_at"] == [5] and report.did == 5


@pytest.mark.parametrize(
    ("cosine", "level"), [(0.97, 5), (0.92, 4), (0.87, 3), (0.8, 2), (0.7, 1), (0.6, 0), (-0.9, 0)]
)
def test_similarity_decides_how_much_is_skipped(cosine: float, level: int, tmp_path: Path) -> None:
    """NFE = T - K, and the rest is what the plain sampler makes of the stored state with the new prompt."""
    known, new = prompt(0), prompt(1, prompt(0), cosine)
    states: dict[int, Tensor] = {}
    seen = problem((0,), (known,), DDIM(), Counter())

    class Watch(type(seen.solver)):
        def step(self, denoise: Any, x: Tensor, *rest: Any) -> Any:
            states[len(states)] = x
            return super().step(denoise, x, *rest)

    watching = Watch(**{k: getattr(seen.solver, k) for k in seen.solver.__dataclass_fields__})
    with torch.inference_mode():
        march(replace(seen, solver=watching))
    run(nirvana(tmp_path), (known,))
    out, report, counter = run(nirvana(tmp_path), (new,), (7,))
    assert counter.nfe == 2 * (STEPS - level) and report
    assert report.facts["resumed_at"] == [level] and report.facts["skipped"] == level
    rest = problem((7,), (new,), DDIM(), Counter())
    if level:
        assert report.facts["similarity"] == [pytest.approx(cosine, abs=1e-3)]
        rest = replace(rest, x=states[level], times=rest.times[level:])
    with torch.inference_mode():
        assert torch.equal(out, march(rest))


def test_another_seed_of_the_same_prompt_is_another_picture(tmp_path: Path) -> None:
    run(nirvana(tmp_path), (prompt(0),), (0,))
    plain, _, _ = run(None, (prompt(0),), (1,))
    out, report, _ = run(nirvana(tmp_path), (prompt(0),), (1,))
    assert torch.equal(out, plain) and report and report.facts["resumed_at"] == [0]


def test_rows_begin_where_their_own_prompt_says(tmp_path: Path) -> None:
    """Rows of one batch with different K: each is what it is alone, and the cost is the mean."""
    known = prompt(0)
    run(nirvana(tmp_path), (known,))
    rows = (prompt(1, known, 0.97), prompt(2), prompt(3, known, 0.8), known)
    seeds, levels = (5, 6, 7, 0), [5, 0, 2, 5]
    frozen = nirvana(tmp_path)
    out, report, counter = run(frozen, rows, seeds)
    assert report and report.facts["resumed_at"] == levels
    assert counter.nfe == pytest.approx(2 * (STEPS - sum(levels) / 4))
    for row, (states, seed) in enumerate(zip(rows, seeds, strict=True)):
        (tmp_path / f"{row}").mkdir()
        run(nirvana(tmp_path / f"{row}"), (known,))
        alone, _, _ = run(nirvana(tmp_path / f"{row}"), (states,), (seed,))
        assert float((alone - out[row : row + 1]).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "other",
    [{"steps": 12}, {"stamp": "others"}, {"dtype": "bf16"}, {"model": "else"}, {"facts": {"frames": 8}}],
    ids=str,
)
def test_states_of_another_run_are_not_seen(other: dict[str, Any], tmp_path: Path) -> None:
    known = prompt(0)
    run(nirvana(tmp_path), (known,))
    counter = Counter()
    asked = problem((0,), (known,), DDIM(), counter, steps=other.get("steps", STEPS))
    asked = replace(asked, run=replace(asked.run, **{k: v for k, v in other.items() if k != "steps"}))
    wrap = nirvana(tmp_path).cache(asked.run)
    assert wrap.sampler
    with torch.inference_mode():
        wrap.sampler(march)(asked)
    assert wrap.report().facts["resumed_at"] == [0]
    _, report, _ = run(nirvana(tmp_path), (known,), solver=DDIM(eta=0.5))
    assert report and report.facts["resumed_at"] == [0]


def test_vectors_of_prompts() -> None:
    states, mask = torch.randn(2, 5, 16), torch.tensor([[1.0, 1, 1, 0, 0]] * 2)
    vectors = prompt_vectors({"states": states, "mask": mask})
    assert vectors is not None and vectors.shape == (2, 16)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2))
    pooled = prompt_vectors({"states": states, "pooled": torch.randn(2, 3)})
    assert pooled is not None and pooled.shape == (2, 19)
    assert prompt_vectors({"prompt": torch.ones(2, 5).long(), "mask": mask}) is None
    assert named(entry_name(vectors[0], 12, 3)) == (12, 3)


# ---- redi --------------------------------------------------------------------------------------


def test_redi_ends_its_own_trajectory_bit_for_bit(tmp_path: Path) -> None:
    plain, _, _ = run(None, (prompt(0),))
    first, report, counter = run(redi(tmp_path), (prompt(0),))
    assert torch.equal(first, plain) and counter.nfe == 2 * STEPS and report and report.facts["stored"] == 1
    again, report, counter = run(redi(tmp_path), (prompt(0),))
    assert torch.equal(again, plain) and report
    assert counter.nfe == 2 * (2 + STEPS - 6) and report.facts["skipped"] == 4 and report.facts["distances"] == [0]


def test_redi_error_is_bounded_by_the_distance(tmp_path: Path) -> None:
    """A near prompt ends near: the error falls with the distance of the two states after k steps."""
    run(redi(tmp_path), (prompt(0),))
    errors, distances = [], []
    for scale in (0.3, 0.1, 0.03):
        near = prompt(0) + scale * prompt(9)
        plain, _, _ = run(None, (near,))
        out, report, _ = run(redi(tmp_path, radius=10.0), (near,))
        assert report and report.facts["skipped"] == 4
        errors.append(float((out - plain).square().mean().sqrt()))
        distances += report.facts["distances"]
    assert errors == sorted(errors, reverse=True) and distances == sorted(distances, reverse=True)
    assert all(e < 20 * d for e, d in zip(errors, distances, strict=True)) and errors[-1] > 0


def test_redi_runs_rows_that_found_nothing(tmp_path: Path) -> None:
    run(redi(tmp_path), (prompt(0),))
    out, report, counter = run(redi(tmp_path), (prompt(0), prompt(1)), (0, 3))
    plain = torch.cat([run(None, (prompt(0),), (0,))[0], run(None, (prompt(1),), (3,))[0]])
    assert float((out - plain).abs().max()) < 1e-5 and report
    assert (report.facts["skipped"], report.facts["stored"]) == (4, 1)
    assert counter.nfe == pytest.approx(2 * (STEPS - 4 / 2))


def test_redi_without_steps_between() -> None:
    out, report, _ = run(ReDi(early=0.5, late=0.55), (prompt(0),))
    assert torch.equal(out, run(None, (prompt(0),))[0]) and report
    assert report.did == 0 and "none lies between early = 0.5 and late = 0.55" in report.reason


# ---- the store ---------------------------------------------------------------------------------


def test_what_is_worth_least_goes_first() -> None:
    rows = {
        "a": {"saves": 5, "uses": 1, "bytes": 10, "made": 1},
        "b": {"saves": 1, "uses": 4, "bytes": 10, "made": 2},
        "c": {"saves": 2, "uses": 2, "bytes": 10, "made": 3},
        "d": {"saves": 3, "uses": 3, "bytes": 10, "made": 4},
    }
    assert [evicted(rows, limit) for limit in (40, 39, 25, 10, 0)] == [
        [], ["b"], ["b", "c"], ["b", "c", "a"], ["b", "c", "a", "d"],
    ]  # fmt: skip


def test_the_folder_stays_within_its_limit(tmp_path: Path) -> None:
    store = Store.open("it", str(tmp_path / "store"), 0.02)
    for k in range(20):
        store.put("s", f"n{k}", k + 1, {"vector": torch.ones(4), "state": torch.full((500,), float(k))})
        assert store.held() <= store.limit
    names, _ = store.vectors("s")
    assert set(names) == {f"n{k}" for k in range(20 - len(names), 20)} and 5 < len(names) < 20
    # Used entries stay, although they save less than what comes.
    for _ in range(50):
        store.take("s", names[0])
    for k in range(20, 40):
        store.put("s", f"n{k}", 19, {"vector": torch.ones(4), "state": torch.full((500,), float(k))})
    assert names[0] in store.vectors("s")[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_entry_is_dropped_with_a_warning(damage: str, tmp_path: Path) -> None:
    """Never a wrong picture: the run is the plain one, and the entry is gone."""
    known = prompt(0)
    plain, _, _ = run(None, (known,))
    run(nirvana(tmp_path), (known,))
    files = sorted((tmp_path / "store").glob("*/*.safetensors"))
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[-3] ^= 1
        changed = {"cut": content[: len(content) // 2], "empty": b"", "swap": files[0].read_bytes()}
        file.write_bytes(changed.get(damage, content))
    with pytest.warns(UserWarning, match=r"nirvana: .*\.safetensors is damaged and was dropped"):
        out, report, counter = run(nirvana(tmp_path), (known,))
    assert torch.equal(out, plain) and counter.nfe == 2 * STEPS and report and report.facts["skipped"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report, _ = run(nirvana(tmp_path), (known,))
    assert report and report.facts["skipped"] == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "suite-store/1", "entries": {"a": {}}}'])
def test_a_damaged_index_is_made_anew(content: str, tmp_path: Path) -> None:
    run(nirvana(tmp_path), (prompt(0),))
    (tmp_path / "store" / "index.json").write_text(content)
    with pytest.warns(UserWarning, match=r"index.json is damaged and was made anew"):
        _, report, _ = run(nirvana(tmp_path), (prompt(0),))
    assert report and report.facts["skipped"] == 5


def test_folders_that_are_no_stores(tmp_path: Path) -> None:
    file, other, newer = tmp_path / "file", tmp_path / "other", tmp_path / "newer"
    file.write_text("x")
    other.mkdir()
    (other / "holiday.jpg").write_text("x")
    newer.mkdir()
    (newer / "index.json").write_text(json.dumps({"format": "suite-store/9", "entries": {}}))
    for place, message in [
        (file, r"nirvana: store = '.*file' cannot be used"),
        (other, r"nirvana: .*other is not empty and holds no index.json, so it is not a store"),
        (newer, r"is of format 'suite-store/9', expected 'suite-store/1'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Nirvana(str(place)).cache(TINY.run())
    assert (other / "holiday.jpg").exists()


WRITER = """
import sys, torch
from suite.plugins.cache._store import Store
store = Store.open("it", sys.argv[1], 0.05)
for k in range(25):
    mine = {"vector": torch.full((4,), float(k)), "state": torch.full((300,), float(k))}
    store.put("s", f"{sys.argv[2]}-{k}", 1 + k, mine)
    names, _ = store.vectors("s")
    entry = store.take("s", names[k % len(names)])
    assert entry is None or float(entry["state"][0]) == float(entry["vector"][0])
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Neither loses what the other wrote, the limit holds, and index and files say the same."""
    place = tmp_path / "store"
    workers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(place), name], stderr=subprocess.PIPE)
        for name in "ab"
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()
    rows = json.loads((place / "index.json").read_text())["entries"]
    files = {f"s/{f.name.removesuffix('.safetensors')}" for f in place.glob("s/*.safetensors")}
    assert files == rows.keys() and {k[2] for k in rows} == {"a", "b"}
    assert sum(row["bytes"] for row in rows.values()) <= 0.05 * 2**20
    assert sum(row["uses"] - 1 for row in rows.values()) > 0
    assert not list(place.rglob(".*.safetensors")), "a temporary file was left"


# ---- refusals ----------------------------------------------------------------------------------


def test_bad_options() -> None:
    for cls, options, message in [
        (Nirvana, {"similarity": "0.9/0.8", "shares": "0.1/0.2"}, r"similarity = 0.9/0.8: expected rising cosines"),
        (Nirvana, {"similarity": "0.9", "shares": "0.1/0.2"}, r"expected one for each of 1 similarities"),
        (Nirvana, {"similarity": "0.9", "shares": "1.0"}, r"shares = 1.0"),
        (Nirvana, {"limit_mib": "0"}, r"limit_mib = 0.0: expected MiB above 0"),
        (ReDi, {"early": "0.7"}, r"early = 0.7, late = 0.6: expected shares"),
        (ReDi, {"radius": "-1"}, r"radius = -1.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(cls, options, name="it")


@pytest.mark.parametrize("cls", [Nirvana, ReDi])
def test_a_state_larger_than_the_store(cls: type, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a state has 0.00.* MiB, and limit_mib = 0.0005; raise it"):
        run(cls(str(tmp_path / "s"), limit_mib=0.0005), (prompt(0),))


def test_prompts_without_vectors(tmp_path: Path) -> None:
    asked = problem((0,), (prompt(0),), DDIM(), Counter())
    wrap = nirvana(tmp_path).cache(asked.run)
    assert wrap.sampler
    with pytest.raises(ConfigError, match=r"holds label and no vectors; drop --cache nirvana"):
        wrap.sampler(march)(replace(asked, cond={"cond": {"label": torch.tensor([1])}}))


@pytest.mark.parametrize(
    ("plugin", "words", "rules"),
    [
        (Nirvana(), "distill", ["C33b"]),
        (Nirvana(), "step-reuse block-outputs", ["N1"]),
        (Nirvana(), "multistep", ["C28"]),
        (Nirvana(), "adaptive-grid", ["C38"]),
        (Nirvana(), "stochastic-step", []),
        (ReDi(), "stochastic-step", ["D1"]),
        (ReDi(), "distill", ["C33b"]),
        (Nirvana(), "branch-axis", ["C6"]),
        (ReDi(), "branch-axis", ["C6"]),
    ],
)
def test_rules(plugin: Plugin, words: str, rules: list[str]) -> None:
    chain = [Member("it", "cache", plugin.effects), Member("other", "other", frozenset(words.split()))]
    assert [f.rule.id for f in check(chain)] == rules


def test_3d_is_refused() -> None:
    for name in ("nirvana", "redi"):
        with pytest.raises(RuleError, match=rf"{name} with this run \(distill\).*rule C33b"):
            make_plan("3d", {"cache": [name]})


# ---- parts of a batch, and the engine ----------------------------------------------------------


def test_some_rows_of_a_problem() -> None:
    """Their own conditioning and streams; evaluations count as the share of the batch that they are."""
    counter = Counter()
    whole = problem((3, 4, 5), (prompt(0), prompt(1), prompt(2)), Ancestral(), counter)
    with torch.inference_mode():
        together = march(whole)
        counter.clear()
        parts = [march(some(replace(whole, rng=drawn((3, 4, 5))), rows)) for rows in ([0, 2], [1])]
    assert counter.nfe == pytest.approx(2 * STEPS) and counter.depth == 2 * STEPS
    assert float((torch.cat(parts)[[0, 2, 1]] - together).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["nirvana", "redi"])
def test_through_the_engine(name: str, tmp_path: Path) -> None:
    recipe = {"steps": 10, "guidance": 2.0, "solver": "ddim", "dtype": "fp32"}
    with Engine.from_recipe(recipe) as engine:
        plain = engine.generate("a red apple", seed=3)
    cached = {**recipe, "cache": [f"{name}:store={tmp_path / 'store'}"]}
    results = []
    for _ in range(2):  # as two requests of two processes
        with Engine.from_recipe(cached) as engine:
            results.append(engine.generate("a red apple", seed=3))
    nfe = [r.report.nfe for r in results]
    assert nfe == [20, 10 if name == "nirvana" else 12]
    for result in results:
        assert result.artifacts[0].tobytes() == plain.artifacts[0].tobytes()
        assert result.report.plugins[-1].did


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    command = [sys.executable, "-m", "suite.cli", "image", "a red apple", "--steps", "8", "--solver", "ddim", "--cache"]
    done = subprocess.run(
        [*command, f"nirvana:store={tmp_path}/file", "-o", str(tmp_path / "a.png")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot be used" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("held", [False, True])
def test_a_full_disk_costs_the_store_and_not_the_result(held: bool, tmp_path: Path) -> None:
    expected, _, _ = run(nirvana(tmp_path / "other"), (prompt(0),))
    if held:  # then it is the index that cannot be written, to count a use
        run(nirvana(tmp_path), (prompt(0),))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.warns(UserWarning, match="nirvana: the store .* could not be written; the result is not affected"):
            out, _, _ = run(nirvana(tmp_path), (prompt(0),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(out, expected)
    assert not list(tmp_path.rglob(".suite-*"))
