"""`Request`: what is asked of a modality, and the options that a modality declares. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from suite.errors import ConfigError
from suite.files.printable import short
from suite.host.bounds import LARGEST
from suite.host.suggest import nearest

if TYPE_CHECKING:
    from suite.diffusion.start import Init

Value = int | float | str | bool


@dataclass(frozen=True)
class RequestOption:
    """One thing that a modality lets people choose besides the prompt: frames, seconds, a way to distill.

    Attributes:
        name: as in `--name` and in reports; hyphens are written as such.
        kind: int, float, str or bool.
        help: one line for the command's help.
        default: None leaves it to the model.
        low, high: inclusive range of numbers; a model may allow less and says so itself.
        choices: of a text.
        path: it names a file or a folder, so a replay does not take it from the result.
    """

    name: str
    kind: type[int] | type[float] | type[str] | type[bool]
    help: str
    default: Value | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False

    def check(self, value: Any) -> Value:
        """The value, as `kind`.

        Raises:
            ConfigError: wrong type, out of range, or not one of the choices.
        """
        if self.kind is float and type(value) is int and abs(value) < LARGEST:
            value = float(value)
        fits = type(value) is self.kind
        if fits and isinstance(value, int | float):
            fits = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if not fits or (self.choices and value not in self.choices):
            raise ConfigError(f"--{self.name} {short(value, 200)}: expected {self._expected()}")
        return value

    def _expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[self.kind]
        low = "" if self.low is None else f" from {self.low:g}"
        high = "" if self.high is None else f" {'up ' if self.low is None else ''}to {self.high:g}"
        return kind + low + high


@dataclass(frozen=True)
class Request:
    """One batch as the modality sees it.

    Attributes:
        prompts: one a sample.
        negative: what to keep away from; the unconditional branch of all samples.
        options: a value for each option that the modality declares; None where the model decides.
        init: a file to begin with, if any.
    """

    prompts: tuple[str, ...]
    negative: str = ""
    options: Mapping[str, Value | None] = field(default_factory=dict)
    init: Init | None = None

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.prompts)


def resolve(
    declared: Sequence[RequestOption], given: Mapping[str, Any] | None, modality: str
) -> dict[str, Value | None]:
    """A checked value for every declared option; defaults where nothing, or None, is given.

    Raises:
        ConfigError: an option that the modality has not, or a value that it does not take.
    """
    known = {option.name: option for option in declared}
    for name in given or {}:
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known) or 'none'}"
            raise ConfigError(f"modality {modality} has no option {name!r}{hint}")
    asked = {name: value for name, value in (given or {}).items() if value is not None}
    return {name: option.check(asked[name]) if name in asked else option.default for name, option in known.items()}
