"""Sources, tokenizer and container of the text training set."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from suite.errors import ConfigError
from suite.modalities.text import data as text_data
from suite.modalities.text import sources
from suite.modalities.text.data import LONGEST, load, prepare, write
from suite.modalities.text.sources import Record, Source, plain, read_novel, read_speeches, read_wordnet
from suite.modalities.text.vocabulary import MASK, NONE, PAD, SPECIAL

NOUNS = """  1 This line is of the licence.
00001740 03 n 02 calamity 0 tragedy 1 001 @ 00001930 n 0000 | (used loosely) an event of great loss; "the whole city was affected by the calamity"; "a tragedy"
00001930 03 n 01 Bach 0 001 @i 00002137 n 0000 | German baroque organist
00002137 03 n 01 noon 0 000 | twelve o'clock, that is 12:00
"""  # noqa: E501
ADJECTIVES = '00003000 00 a 01 galore(ip) 0 000 | existing in great numbers; "whiskey galore on the table"\n'


def tgz(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as box:
        for name, text in files.items():
            content = text.encode()
            item = tarfile.TarInfo(name)
            item.size = len(content)
            box.addfile(item, io.BytesIO(content))
    return path


def test_wordnet(tmp_path: Path) -> None:
    box = tgz(tmp_path / "w.tgz", {"usr/share/wordnet/data.noun": NOUNS, "usr/share/wordnet/data.adj": ADJECTIVES})
    found = list(read_wordnet(box))
    assert found == [
        Record(0, ("galore (adjective)",), "existing in great numbers"),
        Record(1, ("sentence: galore",), "whiskey galore on the table"),
        Record(0, ("calamity (noun)", "tragedy (noun)"), "an event of great loss"),
        Record(1, ("sentence: calamity",), "the whole city was affected by the calamity"),
    ], "no person, no digits, no note on usage, no example of fewer than three words"


def test_passages_of_the_novel_and_the_speeches(tmp_path: Path) -> None:
    sentence = "The white whale swam before him, as the captain cried to the mate. "
    box = tgz(tmp_path / "n.tgz", {"package/moby-dick/data/chapter_2.txt": "CHAPTER 2.\n\n" + sentence * 40,
                                   "package/sotu/data/1790.txt": "Fellow citizens: " + sentence * 20})  # fmt: skip
    novel, speech = list(read_novel(box)), list(read_speeches(box))
    assert {r.kind for r in novel} == {2} and {r.kind for r in speech} == {3}
    assert all(len(r.text) <= 260 and r.text == plain(r.text) for r in (*novel, *speech))
    assert all(r.prompts[0] == "novel" for r in novel)
    for record in novel:
        for prompt in record.prompts[1:]:
            assert all(word in record.text for word in prompt.removeprefix("novel: ").split(", "))
    assert "chapter" not in " ".join(r.text for r in novel)


def test_plain() -> None:
    assert plain("“It’s”  —\n A") == '"it\'s" - a'


def test_round_trip(data: Path, records: list[Record]) -> None:
    read = load(data)
    tokenizer = Tokenizer.from_str(read.tokenizer)
    fits = [r for r in records if len(tokenizer.encode(r.text).ids) <= LONGEST]
    assert len(read) == len(fits) > 500
    for k in (0, 1, len(fits) - 1):
        row = read.tokens[read.offsets[k] : read.offsets[k + 1]].tolist()
        assert tokenizer.decode(row).strip() == fits[k].text
    assert read.prompt_texts.tolist() == [k for k in range(len(fits)) for _ in range(2)]
    first = read.prompt_tokens[: read.prompt_offsets[1]].tolist()
    assert tokenizer.decode(first).strip() == fits[0].prompts[0]
    assert read.lengths.max() <= LONGEST and read.vectors.shape == (600, 48)


def test_special_tokens_come_first_and_are_never_text(data: Path) -> None:
    read = load(data)
    tokenizer = Tokenizer.from_str(read.tokenizer)
    assert [tokenizer.token_to_id(s) for s in SPECIAL] == [PAD, MASK, NONE] == [0, 1, 2]
    assert read.tokens.min() > NONE


def test_any_text_can_be_written_with_the_tokens(data: Path) -> None:
    tokenizer = Tokenizer.from_str(load(data).tokenizer)
    assert tokenizer.decode(tokenizer.encode("Zymurgy, ÆON 42!").ids).strip() == "zymurgy, æon 42!"


def test_one_in_fifty_is_held_out(data: Path) -> None:
    held = load(data).held_out
    assert held.nonzero()[:, 0].tolist() == list(range(0, len(held), 50))


def test_same_records_give_the_same_bytes(data: Path, written_again: Path) -> None:
    assert written_again.read_bytes() == data.read_bytes()


def test_too_large_is_refused_and_leaves_nothing(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than 0\.0"):
        write(tmp_path / "x.safetensors", records[:50], 600, [], lambda w: torch.zeros(len(w), 4), limit=100)
    assert not list(tmp_path.iterdir())


def test_prepare_reads_all_sources(tmp_path: Path) -> None:
    archive = replace(sources.STDLIB, name="tiny", sha256=None)
    tgz(tmp_path / f"{archive.key}.tgz", {"x": "y"})
    texts = [Record(0, (f"word{k} (noun)",), f"a thing of kind {k}") for k in range(60)]
    source = Source(archive, 60, lambda path: iter(texts))
    made = prepare(tmp_path, 600, tmp_path / "out", (source,), lambda w: torch.zeros(len(w), 4))
    assert made.name == "text-600.safetensors" and len(load(made)) == 60
    assert load(made).about["sources"][0]["name"] == "tiny"
    with pytest.raises(ConfigError, match="gave 60 texts, expected 61"):
        prepare(tmp_path, 600, tmp_path, (replace(source, expected=61),), lambda w: torch.zeros(len(w), 4))


@pytest.mark.parametrize("size", [100, 70000])
def test_prepare_refuses_a_vocabulary_out_of_range(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"size is {size}"):
        prepare(tmp_path, size)


def test_load_names_what_is_wrong(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="suite data prepare text"):
        load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"cut\.safetensors is damaged"):
        load(cut)


def test_shipped_real_texts_are_of_every_kind() -> None:
    lines = (Path(text_data.__file__).parent / "metrics" / "weights" / "real.jsonl").read_text().splitlines()
    real = [json.loads(line) for line in lines]
    assert len(real) == 1000 and {r["kind"] for r in real} == set(sources.KINDS)
    assert all(r["text"] == plain(r["text"]) and r["prompt"] for r in real)


def test_word_pieces_that_can_be_written_come_first(pieces: Path, records: list[Record]) -> None:
    from suite.modalities.text.pieces import BEGIN, only
    from suite.modalities.text.vocabulary import written

    read = load(pieces)
    tokenizer = Tokenizer.from_str(read.tokenizer)
    assert [tokenizer.token_to_id(s) for s in (*SPECIAL, BEGIN)] == [0, 1, 2, 3]
    assert 3 < read.tokens.min() and read.tokens.max() < read.outputs < tokenizer.get_vocab_size() == 30522
    ends = read.prompt_offsets[1:] - 1
    assert (read.prompt_tokens[read.prompt_offsets[:-1]] == 3).all() and (read.prompt_tokens[ends] == PAD).all()
    rows = [read.tokens[a:b].tolist() for a, b in zip(read.offsets, read.offsets[1:], strict=False)]
    fits = [r for r in records if len(only(tokenizer, read.outputs).encode(r.text).ids) <= LONGEST + 2]
    texts = {r.text for r in fits}
    same = sum(written(tokenizer, row) in texts for row in rows)
    assert same > 0.97 * len(rows), "word pieces drop spaces; what is written has them back"
    rare = only(tokenizer, read.outputs).encode("zyzzyva falafel", add_special_tokens=False)
    assert max(rare.ids) < read.outputs and "[UNK]" not in rare.tokens


def test_reference_texts_are_held_out(records: list[Record], tmp_path: Path) -> None:
    reserved = frozenset(r.text for r in records[10:15])
    read = load(
        write(tmp_path / "x.safetensors", records, 600, [], lambda w: torch.zeros(len(w), 8), reserved=reserved)
    )
    assert read.held_out[10:15].all() and not read.held_out[15:49].any()
