"""Numbers as people give them: what is far beyond use is refused before any work."""

from __future__ import annotations

from suite.errors import ConfigError
from suite.files.printable import short

LARGEST = 2**63
"""No whole number reaches this one, be it on the command line or in YAML: tensors hold none that does."""
MAX_STEPS = 10_000
MAX_EVALUATIONS = 100_000
MAX_BATCH = 10_000
MAX_SIZE = 8192


def check_numbers(*limits: tuple[str, float | None, float, float]) -> None:
    """Refuse what lies outside its range: (option, value, least, most); None is allowed, nan is not.

    Raises:
        ConfigError: one is.
    """
    for option, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{option} {short(value)}: expected {least:g} to {most:.12g}")
