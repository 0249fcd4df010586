"""Prompts before a model is loaded: what has no letters is refused, what is doubtful or too long is told."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from suite.errors import ConfigError
from suite.host.discovery import MODALITIES, installed
from suite.host.models import shipped
from suite.host.plan import make_plan
from suite.modalities.shared import word_list
from suite.modalities.shared.words import check_words, cut, is_known, tokenizer, unknown
from suite.request import Request

OWN = [n for n, e in installed(MODALITIES).items() if e.distribution == "efficient-diffusion-suite"]
REAL = "falafel awl ewe babka glockenspiel ukulele apples running hottest mice café Zürich 7 2024 mp3".split()


@pytest.mark.parametrize("prompt", ["!!!", "☃☃", "---", "?"])
def test_what_has_no_letters_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="no letters"):
        check_words(["a red apple", prompt])


def test_words_are_never_refused() -> None:
    check_words([*REAL, "qzxv", "žluťoučký kůň", "你好", "7", ""])


@pytest.mark.parametrize("word", REAL)
def test_real_words_are_known(word: str) -> None:
    assert is_known(word) and unknown(f"a {word}", "the prompt") == ()


def test_doubtful_words_are_told_with_words_near_them() -> None:
    (warning,) = unknown("an aple and a xqzzt", "the prompt")
    assert "'an aple and a xqzzt'" in warning and "'aple' (near: " in warning and "apple" in warning
    assert warning.endswith("'xqzzt'")
    assert [unknown(p, "--negative") != () for p in ("qzxv jklmnop", "你好", "zzzz?")] == [True] * 3
    (many,) = unknown(" ".join(f"qz{c}xv" for c in "abcdefgh"), "the prompt")
    assert "and 5 more" in many


def test_the_list_finds_what_it_holds_and_nothing_else() -> None:
    words = word_list._text().decode().split("\n")[:-1]
    assert words == sorted(set(words)) and len(words) > 90_000 and word_list.FILE.stat().st_size < 400 * 2**10
    assert all(map(word_list.listed, [*words[:50], *words[::997], *words[-50:]]))
    assert not any(map(word_list.listed, ["", "0", "zzzzzz", "appl", "applee", *(w + "qq" for w in words[::997])]))


def test_the_list_is_read_quickly_and_only_when_needed() -> None:
    """20 ms at most; the least of several, as the machine has other things to do."""
    word_list._text.cache_clear()
    is_known("apple")
    assert not word_list._text.cache_info().currsize  # one token of the encoder
    times = []
    for _ in range(5):
        word_list._text.cache_clear()
        begun = time.perf_counter()
        assert word_list.is_word("falafel")
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.02


def test_what_does_not_fit_is_told() -> None:
    """24 tokens are 22 and the two marks; `dog` is one token, as is each number."""
    fits, more = " ".join(["dog"] * 22), " ".join(["dog"] * 22 + ["green", "hat"])
    assert cut(fits, 24, "the prompt") == () == cut("", 24, "--negative")
    (warning,) = cut(more, 24, "--negative")
    assert warning.startswith("--negative 'dog dog ") and warning.endswith(
        "has 24 tokens and the model reads 22: 'green hat' is dropped"
    )


def test_what_is_said_to_be_dropped_is_what_the_encoder_drops() -> None:
    torch = pytest.importorskip("torch")
    from suite.modalities.shared.text_encoder import encode

    kept = " ".join(["dog"] * 22)
    one, two, shorter = encode([kept + " green hat", kept + " blue", kept[:-4]]).states
    assert torch.equal(one, two) and not torch.equal(one, shorter)


def test_marks_of_the_encoder_are_read_as_written() -> None:
    pytest.importorskip("transformers")
    from suite.modalities.shared.text_encoder import encode, minilm

    theirs, ours = minilm()[0], tokenizer()
    for text in ("a [MASK] dog", "[SEP] cat [CLS][PAD]", "plain [UNK] words"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).ids
        assert not {ours.token_to_id(m) for m in ("[MASK]", "[PAD]", "[UNK]")} & set(ids)
        assert ids.count(ours.token_to_id("[SEP]")) == ids.count(ours.token_to_id("[CLS]")) == 1
    assert encode(["a [PAD] dog"]).mask.sum() == 7  # [ pad ] are three


@pytest.mark.parametrize("name", OWN)
def test_every_modality_refuses_and_warns(name: str) -> None:
    cls = installed(MODALITIES)[name].load()
    folder, options = make_plan(name).folder, dict.fromkeys(o.name for o in installed(MODALITIES)[name].load().options)
    with pytest.raises(ConfigError, match="no letters"):
        cls.check(folder, Request(("???",), options=options))
    assert not cls.warnings(folder, Request(("a falafel",), "awl", options))
    told = cls.warnings(folder, Request(("a qzxv", "a qzxv"), "aple", options))
    assert len(told) == 2 and "qzxv" in told[0] and told[1].startswith("--negative 'aple'")
    long = " ".join(["dog"] * 30) + " hat"
    if name == "text":  # refuses what it cannot read
        for request in (Request((long,), "", options), Request(("a dog",), long, options)):
            with pytest.raises(ConfigError, match="shorten it"):
                cls.check(folder, request)
        return
    told = cls.warnings(folder, Request((long,), long, options))

    assert [t.startswith("--negative") for t in told] == [False, True]


@pytest.mark.parametrize("name", ["image", "text"])
def test_the_command_refuses_without_torch(name: str) -> None:
    assert shipped(name)
    suffix = {"image": ".png", "text": ".txt"}[name]
    code = (
        f"import sys; from suite.cli import main; code = main(['{name}', '???', '-o', 'x{suffix}']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False" and "no letters" in done.stderr


def test_warnings_need_no_torch() -> None:
    code = (
        "import sys; from suite.host.plan import make_plan; from suite.request import Request; "
        "plan = make_plan('image'); "
        "cls = plan.modality.load(); request = Request(('a qzxv ' + 'dog ' * 30,)); "
        "print(len(cls.warnings(plan.folder, request)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False", done.stderr
