"""Both families through the engine and the command line: what a person relies on, on models of two steps' training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from suite import Engine
from suite.call import Call
from suite.cli import main
from suite.diffusion.rng import SampleRng
from suite.errors import ConfigError
from suite.host.replay import read
from suite.modalities.text import Text, vocabulary
from suite.modalities.text.conditioning import SelfConditioned
from suite.modalities.text.vocabulary import written
from suite.recipe import Recipe
from suite.request import Request

FAMILIES = ["masked", "continuous", "encoder"]


def engine(models, family: str, **changes) -> Engine:
    solver = "ddim" if family == "continuous" else "mdlm"
    content = {"steps": 4, "dtype": "fp32", "schedule": "uniform", "solver": solver, "guidance": 2.0} | changes
    return Engine.from_recipe(Recipe.from_dict(content), modality="text", model=str(models[family]))


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, models):
    with engine(models, request.param) as one:
        yield one


def test_same_seed_same_text_and_other_seed_another(opened):
    first, again, other = (opened.generate("disaster (noun)", seed=s).artifacts for s in (5, 5, 6))
    assert first == again != other


def test_a_sample_does_not_depend_on_its_batch(opened):
    alone = opened.generate("run (verb)", seed=5).artifacts[0]
    assert opened.generate(["dog (noun)", "run (verb)"], seed=5, hold_seed=True).artifacts[1] == alone


def test_report_counts_evaluations(opened):
    report = opened.generate("dog (noun)").report
    assert (report.nfe, report.depth) == (8, 4)
    assert report.options == {"length": None, "start": None}


def test_length_is_the_room(opened):
    short, long = (opened.generate("dog (noun)", num=4, options={"length": n}) for n in (4, 24))
    assert (short.content.shape[1], long.content.shape[1]) == (4, 24)


def test_start_stays_as_it_is(opened):
    for text in opened.generate("dog (noun)", num=4, options={"start": "An  Animal that"}).artifacts:
        assert text.startswith("an animal that")


def test_special_tokens_are_read_as_they_are_written(opened, tmp_path):
    """`<mask>` in a start, a prompt or a file is a word in brackets: no open place, no end, no empty prompt."""
    written = "the <mask> dog <pad> and <none>"
    if opened.modality.tokenizer.token_to_id("[UNK]") is not None:  # its word pieces for texts have no such brackets
        with pytest.raises(ConfigError, match=r"--start: the model .* cannot write '<'; leave it out"):
            opened.generate("dog (noun)", options={"start": written, "length": 24})
        return
    for text in opened.generate("dog (noun)", num=2, options={"start": written, "length": 24}).artifacts:
        assert text.replace(" ", "").startswith(written.replace(" ", ""))
    prompt, _ = prompt_tokens(opened.modality, "a <mask>")
    assert not {vocabulary.PAD, vocabulary.MASK, vocabulary.NONE} & set(prompt) and len(prompt) > 5
    file = tmp_path / "a.txt"
    file.write_text(written)
    kept = opened.generate("dog (noun)", init=opened.init(file, 0), options={"length": 24}).artifacts
    assert [text.replace(" ", "") for text in kept] == [written.replace(" ", "")]


def test_a_text_without_words_is_empty(opened):
    assert [bool(opened.modality.why_empty(text)) for text in ("", " ", "...", "a", "7 .")] == [True] * 3 + [False] * 2


@pytest.mark.parametrize(("options", "message"), [
    ({"length": 25}, "at most 24 tokens"),
    ({"length": 3}, "from 4 to 512"),
    ({"length": 4, "start": "one two three four five"}, "no room for more"),
    ({"lenght": 8}, "did you mean"),
])  # fmt: skip
def test_options_out_of_range(opened, options, message):
    with pytest.raises(ConfigError, match=message):
        opened.generate("dog (noun)", options=options)


@pytest.mark.parametrize(("prompt", "message"), [
    ("?!", "no letters"),
    ("a long prompt that goes on and on without an end and still does not stop", "the model reads 12"),
])  # fmt: skip
def test_prompts_that_cannot_be_read(opened, prompt, message):
    with pytest.raises(ConfigError, match=message):
        opened.generate(prompt)


def prompt_tokens(modality: Text, prompt: str, negative: str = "") -> tuple[list[int], list[int]]:
    found = modality.encode(Request((prompt,), negative))
    return tuple(c["prompt"][c["mask"]].tolist() for c in (found["cond"], found["uncond"]))


def test_a_bare_prompt_is_what_a_sentence_is_about(opened):
    bare = prompt_tokens(opened.modality, "A red  apple")
    assert bare == prompt_tokens(opened.modality, "sentence: a red apple")
    marks = opened.modality.tokenizer.encode("").ids
    assert bare[1] == [*marks[:1], 2, *marks[1:]], "without a negative prompt the other branch is the empty prompt"
    definition = prompt_tokens(opened.modality, "Dog (noun)", "cat (noun)")
    said = [written(opened.modality.tokenizer, row[len(marks[:1]) :]) for row in definition]
    assert said == ["dog (noun)", "cat (noun)"]


@pytest.mark.parametrize("length", [16, 24])
def test_padding_of_a_prompt_changes_nothing(opened, length):
    """A prompt's padding is hidden: whatever stands there, the logits are the same."""
    modality = opened.modality
    cond = modality.encode(Request(("dog (noun)",)))["cond"]
    x = modality.prior(Request(("a",), options={"length": length}), SampleRng((0,)))
    other = {**cond, "prompt": torch.where(cond["mask"], cond["prompt"], 7)}
    t = torch.tensor([700.0])
    with torch.inference_mode():
        a, b = (modality.forward(modality.network.module, x, t, c) for c in (cond, other))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("cache", ["fora:interval=2", "first-block:threshold=0.9"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_find_their_targets(models, family, cache):
    with engine(models, family, cache=cache, steps=6) as one:
        first, again = (one.generate("dog (noun)", num=2, seed=3) for _ in range(2))
    assert first.artifacts == again.artifacts
    assert first.report.plugins[-1].did and first.report.plugins[-1].did > 0


@pytest.mark.parametrize("solver", ["ddim:eta=1", "dpmpp-2m", "heun"])
def test_solvers_of_pictures_write_text(models, solver):
    with engine(models, "continuous", solver=solver) as one:
        texts = one.generate("dog (noun)", num=2).artifacts
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)


SOLVERS = [
    "mdlm", "confidence", "confidence:temperature=0", "confidence:by=margin,block=4", "first-hitting",
    "entropy-bound:bound=2", "threshold:threshold=0.01", "threshold:factor=1", "block-refinement:edits=1",
    "discrete-ddim:eta=0.5",
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_tokens_leave_no_mask(models, solver):
    with engine(models, "masked", solver=solver) as one:
        assert not any("<mask>" in t for t in one.generate("dog (noun)", num=3).artifacts)


@pytest.mark.parametrize(("solver", "steps", "depth"), [
    ("threshold:threshold=0", 8, 1), ("threshold:threshold=1", 40, 16), ("threshold:threshold=1", 8, 8),
    ("entropy-bound:bound=1e6", 8, 1), ("entropy-bound:bound=0", 40, 16), ("first-hitting", 40, 16),
    ("block-refinement:block=4,threshold=1,edits=2", 40, 16 + 4 * 2),
])  # fmt: skip
def test_what_the_data_save_is_counted(models, solver, steps, depth):
    with engine(models, "masked", solver=solver, steps=steps) as one:
        report = one.generate("dog (noun)", num=2, options={"length": 16}).report
    assert (report.steps, report.depth, report.nfe) == (steps, depth, 2 * depth)


@pytest.mark.parametrize(("family", "solver", "message"), [
    ("masked", "ddim", "steps real vectors"),
    ("continuous", "mdlm", "uncovers masked tokens"),
])  # fmt: skip
def test_a_solver_of_the_other_kind_is_refused(models, family, solver, message):
    with engine(models, family, solver=solver) as one, pytest.raises(ConfigError, match=message):
        one.generate("dog (noun)")


class Inner:
    """Answers with its number of calls, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[torch.Tensor] = []

    def denoise(self, x, t, cond, call):
        self.shown.append(cond["before"])
        return torch.full_like(x, float(len(self.shown))) * torch.arange(1, len(x) + 1)[:, None, None]


def test_self_conditioning_keeps_branches_apart_and_starts_from_nothing():
    inner = Inner()
    hook = SelfConditioned(inner, torch.zeros(0, 2))
    x, t = torch.zeros(2, 3, 2), torch.tensor(0.5)
    call = Call(0, 4, 0.5, 0.4)
    hook.denoise(torch.cat([x, x]), t, {}, call.on("cond", "uncond"))
    hook.denoise(x, t, {}, call.on("cond"))
    hook.denoise(x, t, {}, call.on("uncond"))
    hook.denoise(x, t, {}, call.on("ref"))
    assert (inner.shown[0] == 0).all() and (inner.shown[3] == 0).all()
    assert inner.shown[1][:, 0, 0].tolist() == [1, 2]
    assert inner.shown[2][:, 0, 0].tolist() == [3, 4]


def test_self_conditioning_is_fresh_each_run(models):
    with engine(models, "continuous", guidance=1.0) as one:
        request = one.request(("dog (noun)",))
        first, second = (one.modality.denoiser(Inner(), request) for _ in range(2))
    assert first is not second
    assert isinstance(first, SelfConditioned) and not first._last


def test_without_an_ending_the_text_is_printed(models, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["text", "dog (noun)", "--model", str(models["masked"]), "--steps", "2", "--num", "2", "--start", "a dog"]
    assert main(words) == 0
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["a dog"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_text_can_be_replayed(models, capsys, tmp_path, monkeypatch, family, name):
    monkeypatch.chdir(tmp_path)
    model = str(models[family])
    asked = ["--model", model, "--steps", "3", "--start", "a dog", "--length", "20", "--guidance", "2", "-o", name]
    assert main(["text", "dog (noun)", *asked]) == 0
    content = Path(name).read_text()
    if name.endswith("jsonl"):
        line = json.loads(content)
        assert line["text"].startswith("a dog") and line["prompt"] == "dog (noun)"
        assert line["suite"]["options"] == {"length": 20, "start": "a dog"}
    else:
        assert content.startswith("a dog") and content.count("\n") == 1
        assert json.loads(Path("t.txt.json").read_text())["text"] + "\n" == content
    assert read(Path(name)).report["modality"] == "text"
    capsys.readouterr()
    assert main(["replay", name, "--model", model, "-o", f"again-{name}"]) == 0
    assert "bit-identical" in capsys.readouterr().out


def test_many_texts_share_a_jsonl_file(models, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("dog (noun)\nrun (verb)\nbright (adjective)\n")
    Path("all.jsonl").write_text("from before\n")
    asked = ["--model", str(models["masked"]), "--steps", "2", "--length", "20", "--batch", "2"]
    assert main(["text", "@prompts.txt", *asked, "-o", "all.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["all.jsonl"]
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["dog (noun)", "run (verb)", "bright (adjective)"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "prompts.txt"]
    assert main(["replay", "all.jsonl"]) == 2
    assert "holds 3 texts; give a file of one" in capsys.readouterr().err
    Path("third.jsonl").write_text(Path("all.jsonl").read_text().splitlines()[2] + "\n")
    assert main(["replay", "third.jsonl", "--model", str(models["masked"])]) == 0


def test_a_text_that_was_not_made_here(tmp_path):
    (tmp_path / "x.txt").write_text("hello\n")
    with pytest.raises(ConfigError, match=r"x\.txt\.json beside it is lost"):
        Text.read_metadata(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="no keys 'suite'"):
        Text.read_metadata(tmp_path / "x.jsonl")


def test_an_unknown_ending_lists_what_is_possible(models, capsys, tmp_path):
    words = ["text", "dog (noun)", "--model", str(models["masked"]), "-o", str(tmp_path / "x.png")]
    assert main(words) == 2
    assert ".txt, .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({"family": "continuous"}, "expected masked with masked noise"),
    ({"lengths": [24]}, "lengths"),
])  # fmt: skip
def test_a_folder_that_contradicts_itself(models, tmp_path, change, message):
    import shutil

    folder = shutil.copytree(models["masked"], tmp_path / "model")
    facts = json.loads((folder / "suite.json").read_text()) | change
    (folder / "suite.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=message):
        Engine.from_recipe(modality="text", model=str(folder))


@pytest.mark.parametrize("file", ["tokenizer.json", "embedding.safetensors"])
def test_a_damaged_file_is_named(models, tmp_path, file):
    import shutil

    folder = shutil.copytree(models["continuous"], tmp_path / "model")
    (folder / file).write_bytes(b"{")
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        Engine.from_recipe(modality="text", model=str(folder))


def test_a_text_is_begun_with_and_partly_kept(opened, tmp_path):
    (tmp_path / "given.txt").write_text("An  animal that\nlives", encoding="utf-8")
    nothing = opened.generate("dog (noun)", seed=5, init=opened.init(tmp_path / "given.txt", 0))
    assert nothing.artifacts == ["an animal that lives"] and nothing.report.nfe == 0
    everything, usual = (
        opened.generate("dog (noun)", seed=5, init=i).artifacts for i in (opened.init(tmp_path / "given.txt", 1), None)
    )
    assert everything == usual
    part = opened.generate("dog (noun)", num=4, seed=5, init=opened.init(tmp_path / "given.txt", 0.5))
    assert (part.report.steps, part.report.nfe) == (2, 4) and part.report.start["time"] == 0.5
    assert len(set(part.artifacts)) > 1 and usual[0] not in part.artifacts


def test_what_is_kept_of_a_text_is_kept_as_it_is(models, tmp_path):
    (tmp_path / "given.txt").write_text("one two three four five six", encoding="utf-8")
    with engine(models, "masked") as one:
        given = one.modality.to_x0("one two three four five six", one.request(("dog (noun)",)))[0]
        seen = []
        one.modality.decode = lambda x0, request: seen.append(x0) or [""] * len(x0)
        one.generate("dog (noun)", num=8, seed=5, init=one.init(tmp_path / "given.txt", 0.5))
    kept = (seen[0] == given).float().mean()
    assert 0.4 < kept < 0.75  # half is kept, and what is asked for anew may come out the same


@pytest.mark.parametrize(("content", "options", "message"), [
    (b" \n", {}, "holds no words"),
    (b"\xff\xfe\x00", {}, "is not UTF-8 text"),
    (b"word " * 30, {"length": 16}, "there is room for 16; add --length"),
    (b"word", {"start": "an"}, "--start and --init"),
])  # fmt: skip
def test_texts_that_cannot_be_begun_with(opened, tmp_path, content, options, message):
    (tmp_path / "given.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        opened.generate("dog (noun)", options=options, init=opened.init(tmp_path / "given.txt", 0.5))


def test_two_models_of_one_vocabulary_share_a_run(models, tmp_path):
    """A model stitched to itself is itself; to one that numbers its words otherwise it cannot be stitched."""
    with engine(models, "masked", steps=4) as one:
        plain = one.generate("dog (noun)", num=3).artifacts
    for name in ("same", models["masked"]):
        with engine(models, "masked", steps=4, compress=f"t-stitch:model={name},share=0.5") as one:
            result = one.generate("dog (noun)", num=3)
            assert result.artifacts == plain and result.report.plugins[-1].did == 2
    other = tmp_path / "other"
    shutil.copytree(models["masked"], other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = content["added_tokens"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json differs"):
        engine(models, "masked", compress=f"t-stitch:model={other}")
    with pytest.raises(ConfigError, match=r"its noise is|its family is"):
        engine(models, "masked", compress=f"t-stitch:model={models['continuous']}")


def test_a_record_of_another_file_is_none_of_a_text(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("keep.json").write_text("precious")
    asked = ["--model", str(models["masked"]), "--steps", "2", "--length", "20"]
    assert main(["text", "dog (noun)", *asked, "-o", "keep.txt"]) == 0
    assert Path("keep.json").read_text() == "precious" and Path("keep.txt.json").is_file()
    Path("keep.txt.json").rename("keep.json")  # as earlier versions named it
    assert read(Path("keep.txt")).report["prompts"] == ["dog (noun)"]
    Path("keep.txt").write_text("another text\n")
    with pytest.raises(ConfigError, match=r"keep\.txt\.json beside it is lost"):
        Text.read_metadata(Path("keep.txt"))


def test_a_joined_file_is_gone_on_with(models, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["dog (noun)", "--num", "5", "--batch", "2", "--model", str(models["masked"]), "--steps", "2"]
    asked = ["text", *asked, "--length", "20", "-o", "all.jsonl", "--json"]
    assert main(asked) == 0
    whole = Path("all.jsonl").read_text().splitlines()
    Path("all.jsonl").write_text("\n".join(whole[:3]) + "\n")
    capsys.readouterr()
    assert main([*asked, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == ["all.jsonl"] * 3
    resumed = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [row["text"] for row in resumed] == [json.loads(line)["text"] for line in whole]
    Path("all.jsonl").write_text(whole[0][:-20] + "\n")
    assert main([*asked, "--resume"]) == 2
    assert "no whole result" in json.loads(capsys.readouterr().out)["error"]
