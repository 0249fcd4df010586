"""Prompts as people give them: one text or a file of texts; how many samples, from which seeds, called what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from suite.errors import ConfigError
from suite.input_file import read_text

MAX_SEED = 2**63 - 1
SLUG_LENGTH = 48


def read(text: str) -> list[str]:
    """The prompt, or with `@FILE` the lines of a UTF-8 file that are not blank.

    Raises:
        ConfigError: the file is missing, not text, or holds no prompt.
    """
    if not text.startswith("@"):
        return [text]
    file = Path(text[1:])
    try:
        content = read_text(file, "prompt file")
    except ConfigError as error:
        raise ConfigError(f"{error}; @FILE names a file of prompts") from error
    prompts = [line.strip() for line in content.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt file {file} holds no prompt; write one a line")
    return prompts


def expand(prompts: Sequence[str], num: int, seed: int) -> tuple[list[str], list[int]]:
    """(prompt, seed) of every sample: each prompt `num` times, seeds seed .. seed + num - 1.

    Raises:
        ConfigError: no prompt, an empty one, num < 1, or a seed that no generator takes.
    """
    if not prompts or any(not p.strip() for p in prompts):
        raise ConfigError('the prompt is empty; write what you want, e.g. "a red apple"')
    if num < 1:
        raise ConfigError(f"num = {num}: expected at least 1")
    if not 0 <= seed <= MAX_SEED - num:
        raise ConfigError(f"seed = {seed}: expected a whole number from 0 to 2**63 - 1")
    return [p for p in prompts for _ in range(num)], [seed + k for _ in prompts for k in range(num)]


def slug(prompt: str, otherwise: str) -> str:
    """A file name without ending: the prompt's letters and digits in lower case, joined by hyphens."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or otherwise


def names(prompts: Sequence[str], otherwise: str, first: Callable[[str, bool], int | None]) -> list[str]:
    """A slug for each sample, numbered -000, -001, ... where several samples would share it; all differ.

    Args:
        first: (slug, whether several share it) -> its first number; None is none, for a slug that is not shared.
    """
    slugs = [slug(p, otherwise) for p in prompts]
    shared = Counter(slugs)
    begin = {s: first(s, times > 1) for s, times in shared.items()}
    used = {s for s, number in begin.items() if number is None}
    numbers = {s: count(number or 0) for s, number in begin.items()}
    out = []
    for one in slugs:
        name = one
        if begin[one] is not None:
            name = next(n for k in numbers[one] if (n := f"{one}-{k:03d}") not in used)
            used.add(name)
        out.append(name)
    return out
