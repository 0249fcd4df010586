"""Kinds and bounds of what is read from files, and how it is shown."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from suite.errors import ConfigError
from suite.files.untrusted import (
    DEPTH,
    MAX_SEED,
    Flag,
    Items,
    Kind,
    Number,
    OneOf,
    Section,
    Table,
    Text,
    Whole,
    check,
    message,
    parse_json,
    shown,
)

FITS: list[tuple[Any, Kind]] = [
    (3, Whole(1, 10)),
    (MAX_SEED, Whole()),
    (3, Number(0, 3)),
    (0.5, Number()),
    ("ab", Text(2)),
    (True, Flag()),
    ("b", OneOf(("a", "b"))),
    ([1, 2], Items(Whole(), 2, 2)),
    ({"x": 1.5}, Table(Number())),
    ({"a": 1, "b": None, "further": []}, Section({"a": Whole()}, {"b": Text()})),
]


@pytest.mark.parametrize(("value", "kind"), FITS)
def test_what_fits(value: Any, kind: Kind) -> None:
    assert check(value, kind, "x.json") is value


FAULTS: list[tuple[Any, Kind, str]] = [
    (11, Whole(1, 10), "x.json: it is 11, expected a whole number from 1 to 10"),
    (True, Whole(), "it is true, expected a whole number from 0 to 2**63 - 1"),
    (2**63, Whole(), "expected a whole number"),
    (10**400, Number(), "it is a number of some 400 digits"),
    (math.nan, Number(), "expected a finite number"),
    ("abc", Text(2), "expected a text of at most 2 characters"),
    ("../x", Text(9, "[a-z]+", "a word"), "it is '../x', expected a word"),
    (1, Flag(), "expected true or false"),
    (1, OneOf((True,)), "expected one of True"),
    ([1], Items(Whole(), 2, 2), "expected a list of 2 values"),
    ([1, "a"], Items(Whole()), "[1] is 'a'"),
    ({"a": {"b": [0, -1]}}, Section({"a": Table(Items(Whole()))}), "a.b[1] is -1"),
    ({"promts": []}, Section({"prompts": Items(Text())}), "says nothing about 'prompts'; did you mean promts"),
    ({"a": 1}, Section({"b": Whole()}, {"a": Text()}), "says nothing about 'b'"),
    ({"a" * 300: 1}, Table(Whole()), "expected a short text"),
]


@pytest.mark.parametrize(("value", "kind", "expected"), FAULTS, ids=range(len(FAULTS)))
def test_what_does_not_fit(value: Any, kind: Kind, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(value, kind, "x.json")
    assert expected in str(caught.value) and str(caught.value).startswith("x.json")


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", "1e999", "[" * 100_000, "[" * (DEPTH + 2) + "]" * (DEPTH + 2), "{"]
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.json is (not JSON|nested)"):
        parse_json(text, "x.json")


def test_json_that_is_read() -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "d"}}
    assert parse_json(json.dumps(content), "x.json") == content


def test_messages_are_one_short_line() -> None:
    assert message("while parsing\n  line 3\x07") == "while parsing line 3\\x07"
    told = message("1\x1b]0;X\x07 \x9b31m \u202etxt\u2066 a\rb \ud800 ok é 漢")
    assert told.isprintable() and "\\x1b]0;X\\x07" in told and "\\u202e" in told and told.endswith("ok é 漢")
    assert len(message("x" * 10_000)) <= 2000
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    for value in ("x" * 10**6, 10**5000, nested, {"k" * 1000: 1}, b"\x00", math.nan, "\x1b" * 1000):
        assert len(shown(value)) <= 80 and shown(value).isprintable()
