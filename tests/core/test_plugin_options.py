"""Options of plugins: converted from text to the declared types, and refused with a reason."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.errors import ConfigError
from suite.plugin import Plugin, build, convert, options_of
from suite.recipe import Named


@dataclass(frozen=True)
class Options(Plugin):
    """One option of every kind."""

    count: int
    rate: float = 0.5
    on: bool = False
    word: str = "a"
    kind: Literal["fast", "exact"] = "fast"
    level: Literal[1, 2] = 1
    limit: int | None = None
    old_style: Optional[float] = None  # noqa: UP045
    parts: tuple[str, ...] = ("attention", "mlp")
    span: tuple[float, float] = (0.0, 1.0)
    either: int | str = 1
    made: tuple[int, ...] = field(default_factory=lambda: (1, 2))

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ValueError("rate: expected at most 1")


@dataclass(frozen=True)
class None_(Plugin):
    """No options."""


def made(**options: Any) -> Options:
    return build(Options, {"count": 1, **options}, name="mine")


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("rate", "1e-1", 0.1),
        ("rate", 1, 1.0),
        ("on", "yes", True),
        ("on", "False", False),
        ("on", True, True),
        ("word", "b", "b"),
        ("word", 7, "7"),
        ("kind", "exact", "exact"),
        ("level", "2", 2),
        ("level", 2, 2),
        ("limit", "none", None),
        ("limit", None, None),
        ("limit", "4", 4),
        ("old_style", "0.5", 0.5),
        ("old-style", "0.5", 0.5),
        ("parts", "a/b", ("a", "b")),
        ("parts", ["a", "b"], ("a", "b")),
        ("parts", "a", ("a",)),
        ("span", "0.2/0.8", (0.2, 0.8)),
        ("span", [0, 1], (0.0, 1.0)),
        ("either", "x", "x"),
        ("either", "5", 5),
        ("made", "3/4", (3, 4)),
    ],
)
def test_conversion(key: str, raw: Any, value: Any) -> None:
    got = getattr(made(**{key: raw}), key.replace("-", "_"))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": "three"}, "count='three': expected a whole number"),
        ({"count": 1.5}, "expected a whole number"),
        ({"count": True}, "expected a whole number"),
        ({"rate": "fast"}, "expected a number"),
        ({"rate": 2}, "plugin mine: rate: expected at most 1"),
        ({"on": "maybe"}, "expected true or false"),
        ({"on": 1}, "expected true or false"),
        ({"kind": "slow"}, "expected one of fast, exact"),
        ({"level": "3"}, "expected one of 1, 2"),
        ({"limit": "x"}, "expected a whole number"),
        ({"span": "0.2"}, "expected 2 values separated by '/'"),
        ({"parts": 3}, "parts=3: expected"),
        ({"rat": 0.1}, "unknown option 'rat'.*did you mean rate"),
        ({"zzz": 0.1}, "its options: count, rate"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(**options)


def test_required_and_absent_options() -> None:
    with pytest.raises(ConfigError, match=r"'count' is required; write mine:count="):
        build(Options, {}, name="mine")
    with pytest.raises(ConfigError, match="it has no options"):
        build(None_, {"a": 1}, name="mine")
    assert options_of(int) == {}
    assert list(options_of(None_)) == []


@given(
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(-1e300, 1.0, allow_nan=False),
    st.booleans(),
    st.lists(st.text("abc", min_size=1), min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
)
@settings(database=None, deadline=None, max_examples=100)
def test_text_round_trip(count: int, rate: float, on: bool, parts: tuple[str, ...], limit: int | None) -> None:
    plugin = Options(count, rate, on, parts=parts, limit=limit)
    values = {name: getattr(plugin, name) for name in options_of(Options)}
    assert build(Options, Named.parse(str(Named("mine", values))).options, name="mine") == plugin


def test_convert_leaves_what_it_does_not_know() -> None:
    thing = object()
    assert convert(thing, object) is thing
