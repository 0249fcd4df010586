"""Prompts and seeds as people give them."""

from pathlib import Path

import pytest

from suite.errors import ConfigError
from suite.host import prompts
from suite.host.prompts import MAX_SAMPLES, MAX_SEED, expand, in_turn, read, seed_of


def test_seeds_go_on_over_all_samples_or_are_held() -> None:
    assert expand(["a", "b"], 2, 5) == (["a", "a", "b", "b"], [5, 6, 7, 8])
    assert expand(["a", "b"], 2, 5, hold=True) == (["a", "a", "b", "b"], [5, 6, 5, 6])
    assert in_turn(["a", "b"], 3, 5) == (["a", "b", "a"], [5, 6, 7])


def test_the_largest_seed_can_be_used() -> None:
    assert expand(["a"], 1, MAX_SEED)[1] == [MAX_SEED]
    assert expand(["a", "b"], 1, MAX_SEED, hold=True)[1] == [MAX_SEED, MAX_SEED]
    with pytest.raises(ConfigError, match="2 samples need seeds up to 9223372036854775808"):
        expand(["a"], 2, MAX_SEED)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, None, "x", "", "9" * 5000, "1.0"])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="expected a whole number from 0 to") as refused:
        seed_of(seed)
    assert len(str(refused.value)) < 200


def test_a_random_seed_is_chosen_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({seed_of("random") for _ in range(4)}) > 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each rank would choose another"):
        seed_of("random")
    monkeypatch.setenv(prompts.CHOSEN, "17")
    assert seed_of("random") == 17


@pytest.mark.parametrize("num", [0, -1, MAX_SAMPLES + 1, 10**9, 10**400])
def test_no_request_is_larger_than_memory(num: int) -> None:
    with pytest.raises(ConfigError, match=r"expected at (least 1|most 100000)"):
        expand(["a"], num, 0)


def test_two_at_signs_are_one(tmp_path: Path) -> None:
    assert read("@@home") == ["@home"]
    assert read("@@@file") == ["@@file"]
    (tmp_path / "p").write_text("a\n@home\n@@x\n")
    assert read(f"@{tmp_path / 'p'}") == ["a", "@home", "@@x"]
