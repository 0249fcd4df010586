"""The shipped image model through the engine: what a person and a researcher rely on."""

import ctypes
import json
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures

import suite
from suite import Engine
from suite.errors import ConfigError, NoOpError, RuleError
from suite.host.models import shipped
from suite.recipe import Recipe

STEPS = 4
PACKAGE = Path(suite.__file__).parent


def make(**changes):
    content = {"steps": STEPS, "dtype": "fp32", "schedule": "uniform", "solver": "ddim", "guidance": 3.0}
    return Recipe.from_dict(content | changes)


@pytest.fixture(scope="module")
def plain():
    with Engine.from_recipe(make()) as engine:
        yield engine


def pixels(result):
    return [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in result.artifacts]


def test_same_seed_same_picture_and_other_seed_another(plain):
    first, again, other = (pixels(plain.generate("a red apple", seed=s))[0] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_does_not_depend_on_its_batch(plain):
    alone = pixels(plain.generate("a red apple", seed=5))[0].int()
    together = pixels(plain.generate(["a blue heart", "a red apple"], seed=5, hold_seed=True))[1].int()
    # Equal noise and conditioning; matrix products of another size may round the last level differently.
    assert (alone - together).abs().max() <= 1


def test_an_engine_fixes_the_number_of_threads_of_matrix_products():
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(library, "mkl_serv_set_dynamic"):
        pytest.skip("this PyTorch has no MKL, whose habit of taking fewer threads at will is what this is about")
    library.mkl_serv_set_dynamic(1)  # as in a process in which nobody has set the number of threads
    with Engine.from_recipe(make()):
        assert library.mkl_serv_get_dynamic() == 0


def test_report_counts_evaluations(plain):
    report = plain.generate("a red apple").report
    assert (report.steps, report.nfe, report.depth) == (STEPS, 2 * STEPS, STEPS)
    with Engine.from_recipe(make(guidance=1.0, solver="heun")) as engine:
        report = engine.generate("a red apple").report
    # Heun: the step from alpha = 0 and the step to sigma = 0 take one evaluation each.
    assert (report.nfe, report.depth) == (2 * STEPS - 2, 2 * STEPS - 2)


def test_guidance_interval_saves_evaluations():
    with Engine.from_recipe(make(guidance_interval=[0.3, 0.8])) as engine:
        report = engine.generate("a red apple").report
    # Times 1, .75, .5, .25: guidance acts at the middle two.
    assert (report.nfe, report.depth) == (STEPS + 2, STEPS)


@pytest.mark.parametrize("cache", ["fora:interval=1", "first-block:threshold=0"])
def test_caches_at_their_off_setting_change_nothing(plain, cache):
    with Engine.from_recipe(make(cache=cache), allow_noop=True) as engine:
        assert torch.equal(
            pixels(engine.generate("a red apple", seed=3))[0], pixels(plain.generate("a red apple", seed=3))[0]
        )
    with Engine.from_recipe(make(cache=cache)) as engine, pytest.raises(NoOpError, match="did nothing"):
        engine.generate("a red apple")


@pytest.mark.parametrize("cache", ["fora:interval=2", "first-block:threshold=0.5"])
def test_caches_act_start_fresh_and_leave_no_trace(plain, cache):
    before = pixels(plain.generate("a red apple", seed=3))[0]
    with Engine.from_recipe(make(cache=cache, steps=8)) as engine:
        first, again = (engine.generate("a red apple", seed=3) for _ in range(2))
        assert torch.equal(pixels(first)[0], pixels(again)[0])
        assert first.report.plugins[-1].did and first.report.plugins[-1].did > 0
        assert not any("forward" in m.__dict__ for m in engine.network.module.modules())
    assert torch.equal(before, pixels(plain.generate("a red apple", seed=3))[0])


def test_int8_shrinks_the_network_and_keeps_the_picture_close(plain):
    with Engine.from_recipe(make(compress="int8")) as engine:
        small = engine.generate("a red apple", seed=3)
    exact = plain.generate("a red apple", seed=3)
    assert small.report.network_bytes < 0.4 * exact.report.network_bytes
    difference = (pixels(small)[0].int() - pixels(exact)[0].int()).abs().float().mean()
    assert difference < 6  # of 255 levels; a wrong scale or transposition gives over 30


def test_rules_act_before_the_model_is_loaded():
    with pytest.raises(RuleError, match="C36"):
        Engine.from_recipe(make(cache=["fora", "first-block"]))
    with pytest.raises(ConfigError, match="lossy"):
        Engine.from_recipe(make(cache=["fora"]), exact=True)


def test_saved_picture_carries_all_that_is_needed_to_make_it_again(plain, tmp_path):
    result = plain.generate(["a red apple", "a blue heart"], seed=9)
    files = result.save(tmp_path / "x.png")
    assert [f.name for f in files] == ["x-000.png", "x-001.png"]
    metadata = plain.modality.read_metadata(files[1])
    assert metadata["index"] == 1
    report = metadata["suite"]
    assert json.dumps(report)
    again = Engine.from_recipe(report["recipe"], model=report["model"]).generate_batch(
        report["prompts"], report["seeds"]
    )
    with Pictures.open(files[1]) as picture:
        assert picture.tobytes() == again.artifacts[1].tobytes()


def test_diffusers_opens_the_shipped_network(plain):
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel.from_pretrained(plain.plan.folder.path / "transformer")
    ours = plain.network.module.state_dict()
    assert all(torch.equal(v.float(), ours[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("model", sorted(shipped("image")))
def test_every_shipped_model_draws(model):
    with Engine.from_recipe(make(cache="fora:interval=2"), model=model) as engine:
        result = engine.generate(["a red apple", "a blue heart"], seed=1)
        _, height, width = engine.modality.shape
    assert [p.size for p in result.artifacts] == [(width, height)] * 2
    assert result.report.plugins[-1].did
    first, second = (p.float() for p in pixels(result))
    assert first.std() > 10 and (first - second).abs().mean() > 10  # a picture, and not the same for both prompts


def test_shipped_weights_fit_their_allowance():
    files = [f for e in shipped("image").values() for f in (PACKAGE / e["path"]).rglob("*.safetensors")]
    files += (PACKAGE / "modalities" / "image" / "metrics").rglob("*.safetensors")
    assert len(files) >= 4 and sum(f.stat().st_size for f in files) <= 24 * 2**20


def beginning(plain, tmp_path, name="other.png"):
    """A picture of something else, as a file."""
    plain.generate("a blue heart", seed=9).artifacts[0].save(tmp_path / name)
    return tmp_path / name


def test_strength_0_is_the_picture_and_1_the_plain_run(plain, tmp_path):
    file = beginning(plain, tmp_path)
    with Pictures.open(file) as picture:
        same = picture.convert("RGB").tobytes()
    nothing = plain.generate("a red apple", seed=5, init=plain.init(file, 0))
    assert nothing.artifacts[0].tobytes() == same and nothing.report.nfe == 0
    everything, usual = (plain.generate("a red apple", seed=5, init=i) for i in (plain.init(file, 1), None))
    assert everything.artifacts[0].tobytes() == usual.artifacts[0].tobytes()


def test_more_strength_goes_further_from_the_picture(plain, tmp_path):
    file = beginning(plain, tmp_path)
    with Pictures.open(file) as picture:
        given = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    results = [plain.generate("a red apple", seed=5, init=plain.init(file, s)) for s in (0.25, 0.5, 0.75, 1)]
    assert [r.report.nfe for r in results] == [2 * k for k in (1, 2, 3, 4)]
    away = [float((pixels(r)[0].float() - given.float()).abs().mean()) for r in results]
    assert away == sorted(away)


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "unipc", "ddim:eta=1"])
def test_solvers_begin_in_the_middle(tmp_path, plain, solver):
    file = beginning(plain, tmp_path)
    with Engine.from_recipe(make(solver=solver, steps=6)) as engine:
        first, again = (engine.generate("a red apple", seed=5, init=engine.init(file, 0.5)) for _ in range(2))
    assert torch.equal(pixels(first)[0], pixels(again)[0]) and first.report.steps == 3


def test_pictures_of_any_size_and_kind_can_be_begun_with(plain, tmp_path):
    """A wide half-transparent picture: its middle, on white."""
    wide = Pictures.new("RGBA", (200, 100), (255, 0, 0, 128))
    wide.save(tmp_path / "wide.webp", lossless=True)
    got = plain.generate("a red apple", init=plain.init(tmp_path / "wide.webp", 0)).artifacts[0]
    assert got.size == (64, 64) and got.getcolors() == [(64 * 64, (255, 127, 127))]
    Pictures.new("L", (30, 30), 77).save(tmp_path / "grey.jpg")
    got = plain.generate("a red apple", init=plain.init(tmp_path / "grey.jpg", 0)).artifacts[0]
    assert got.getcolors() == [(64 * 64, (77, 77, 77))]


def test_a_model_stitched_to_itself_is_itself_and_one_of_another_size_is_refused(plain):
    usual = plain.generate("a red apple", seed=5)
    with Engine.from_recipe(make(compress="t-stitch:model=emoji-64,share=0.5")) as engine:
        got = engine.generate("a red apple", seed=5)
    assert torch.equal(pixels(got)[0], pixels(usual)[0])
    assert (got.report.nfe, got.report.plugins[-1].did) == (usual.report.nfe, 2)
    with pytest.raises(ConfigError, match="emoji-unet-32 cannot take over from emoji-64: its"):
        Engine.from_recipe(make(compress="t-stitch:model=emoji-unet-32"))
