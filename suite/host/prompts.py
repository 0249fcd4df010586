"""Prompts as people give them: one text or a file of texts; how many samples, from which seeds, called what."""

from __future__ import annotations

import operator
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from suite.errors import ConfigError
from suite.files.inputs import read_text
from suite.files.printable import short

MAX_SEED = 2**63 - 1
MAX_SAMPLES = 100_000
"""Most samples of one request: more is a slip of the finger, and their names alone would fill the memory."""
RANDOM = "random"
CHOSEN = "SUITE_SEED"
"""The variable that gives the ranks of one request the seed that was chosen for them."""
SLUG_LENGTH = 48


def read(text: str) -> list[str]:
    """The prompt, or with `@FILE` the lines of a UTF-8 file that are not blank; `@@` begins a prompt with one `@`.

    Raises:
        ConfigError: the file is missing, not text, or holds no prompt.
    """
    if not text.startswith("@"):
        return [text]
    if text.startswith("@@"):
        return [text[1:]]
    file = Path(text[1:])
    try:
        content = read_text(file, "prompt file")
    except ConfigError as error:
        raise ConfigError(f"{error}; @FILE names a file of prompts, and @@ is a plain @") from error
    prompts = [line.strip() for line in content.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt file {file} holds no prompt; write one a line")
    return prompts


def seed_of(value: Any) -> int:
    """A seed as people give it: a whole number, its digits, or `random`.

    Raises:
        ConfigError: it is none, or every rank of a request would choose its own.
    """
    if value == RANDOM and isinstance(value, str):
        if given := os.environ.get(CHOSEN):
            return seed_of(given)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("seed random: each rank would choose another one; give a number, or start by --launch N")
        return secrets.randbelow(2**32)  # short enough to be read out
    try:
        seed = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):  # int() refuses thousands of digits too
        seed = -1
    if isinstance(value, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(
            f"seed = {short(value).strip(chr(39))}: expected a whole number from 0 to 2**63 - 1, or random"
        )
    return seed


def check(prompts: Sequence[str]) -> None:
    """Refuse what is no list of prompts.

    Raises:
        ConfigError: there is none, or one is empty.
    """
    if not prompts or any(not p.strip() for p in prompts):
        raise ConfigError('the prompt is empty; write what you want, e.g. "a red apple"')


def seeds_from(seed: Any, count: int) -> list[int]:
    """`count` seeds, each one more than the one before.

    Raises:
        ConfigError: too many or none, or seeds that no generator takes.
    """
    if not 1 <= count <= MAX_SAMPLES:
        raise ConfigError(f"{short(count)} samples: expected 1 to {MAX_SAMPLES}")
    first = seed_of(seed)
    if first + count - 1 > MAX_SEED:
        raise ConfigError(f"seed = {first}: {count} samples need seeds up to {first + count - 1}, more than 2**63 - 1")
    return list(range(first, first + count))


def expand(prompts: Sequence[str], num: int, seed: Any, hold: bool = False) -> tuple[list[str], list[int]]:
    """(prompt, seed) of every sample: each prompt `num` times; sample k of them all has seed + k.

    Args:
        hold: every prompt begins at `seed` again, so that prompts are compared from the same noise.

    Raises:
        ConfigError: no prompt, an empty one, num < 1, too many samples, or seeds that no generator takes.
    """
    check(prompts)
    if num < 1:
        raise ConfigError(f"num = {num}: expected at least 1")
    count = len(prompts) * num
    if count > MAX_SAMPLES:
        raise ConfigError(f"num = {short(num)}: that makes {short(count)} samples, expected at most {MAX_SAMPLES}")
    seeds = seeds_from(seed, num if hold else count)
    return [p for p in prompts for _ in range(num)], seeds * len(prompts) if hold else seeds


def in_turn(prompts: Sequence[str], count: int, seed: Any) -> tuple[list[str], list[int]]:
    """(prompt, seed) of `count` samples: the prompts in turn, from the first again after the last; seeds go on.

    Raises:
        ConfigError: as `expand`.
    """
    check(prompts)
    seeds = seeds_from(seed, count)
    return [prompts[k % len(prompts)] for k in range(count)], seeds


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
