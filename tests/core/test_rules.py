"""The rule book: every rule has chains that trigger it and chains that do not, made from the rule itself."""

from collections.abc import Sequence

import pytest

from suite.errors import RuleError
from suite.plugin import EFFECT_WORDS
from suite.rules import BOOK, Member, Rule, Verdict, check, enforce

#: Words of the run itself; `suite.host.plan` and the distill driver make them.
RUN_WORDS = {"guided", "unguided", "few-step", "guidance-distilled", "distill", "negative-prompt", "real-vectors"}

#: Rules with a further condition cannot be generated: id -> (a chain that triggers, a chain that does not).
WITH_CONDITION: dict[str, tuple[list[Member], list[Member]]] = {
    "C36": (
        [Member(name, "cache", frozenset({"block-outputs"})) for name in ("one", "two")],
        [
            Member("gate", "cache", frozenset({"block-outputs", "frozen-outputs"})),
            Member("stages", "cache", frozenset({"block-outputs", "stage-outputs"})),
        ],
    )
}

#: What the book is for, in words: (members as `hook word word`, the rules that must match).
CHAINS = [
    ("step cache with DDIM eta 1", ["cache denoiser-output step-reuse", "solver stochastic-step"], ["C3"]),
    ("block cache with DDIM eta 1", ["cache block-outputs step-reuse", "solver stochastic-step"], ["C3b"]),
    ("block cache with DDIM eta 0", ["cache block-outputs step-reuse", "solver"], []),
    ("step cache with DPM++2M", ["cache denoiser-output step-reuse", "solver multistep"], ["C2"]),
    ("guidance parallelism without guidance", ["parallelize branch-axis", "run unguided"], ["C24b"]),
    ("guidance parallelism with guidance", ["parallelize branch-axis", "run guided"], []),
    ("two block caches", ["cache block-outputs", "cache block-outputs"], ["C36"]),
    ("frozen inside of stages", ["cache block-outputs frozen-outputs", "cache block-outputs stage-outputs"], []),
    ("frozen and blocks", ["cache block-outputs frozen-outputs", "cache block-outputs"], ["C36"]),
    ("stages and blocks", ["cache block-outputs stage-outputs", "cache block-outputs"], ["C36"]),
    ("one with both, and blocks", ["cache block-outputs frozen-outputs stage-outputs", "cache block-outputs"], ["C36"]),
    (
        "frozen inside of stages, and blocks",
        ["cache block-outputs frozen-outputs", "cache block-outputs stage-outputs", "cache block-outputs"],
        ["C36"],
    ),
    ("guidance that ends, with one branch a rank", ["cache ends-guidance", "parallelize branch-axis"], ["C25"]),
    ("guidance that ends, with a negative prompt", ["cache ends-guidance", "run negative-prompt"], ["C25b"]),
    ("ControlNet and a cache of stages", ["cache stage-outputs", "compress side-residuals"], ["C31"]),
    ("stale buffers and a cache", ["parallelize stale-activations", "cache block-outputs step-reuse"], ["C10"]),
    ("a block and a step cache", ["cache block-outputs step-reuse", "cache denoiser-output step-reuse"], []),
    ("one cache with both words", ["cache block-outputs denoiser-output"], []),
    ("guidance on a distilled model", ["run guidance-distilled", "run guided"], ["C24"]),
    ("a cache in four steps", ["cache block-outputs step-reuse", "run few-step"], ["C4"]),
    ("int8, block cache, DDIM", ["compress low-bit", "cache block-outputs step-reuse", "solver", "run guided"], []),
]


def chain_of(texts: Sequence[str]) -> list[Member]:
    members = []
    for index, text in enumerate(texts):
        hook, *words = text.split()
        members.append(Member(f"{hook}-{index}", hook, frozenset(words)))
    return members


def triggering(rule: Rule) -> list[Member]:
    """A chain with one member for each part of the rule, and nothing else."""
    texts = []
    for part in rule.parts:
        hooks = [w.removeprefix("hook:") for w in part if w.startswith("hook:")]
        texts.append(" ".join([*(hooks or ["some-hook"]), *sorted(w for w in part if not w.startswith("hook:"))]))
    return chain_of(texts)


def ids(chain: list[Member], rules: Sequence[Rule] = BOOK) -> list[str]:
    return [f.rule.id for f in check(chain, rules)]


@pytest.mark.parametrize("rule", BOOK, ids=lambda r: r.id)
def test_rule_matches_its_chain(rule: Rule) -> None:
    chain = triggering(rule)
    if rule.when is not None:
        assert rule.id in WITH_CONDITION, f"give rule {rule.id} a case in WITH_CONDITION"
        chain, other = WITH_CONDITION[rule.id]
        assert rule.id not in ids(other)
    assert rule.id in ids(chain)
    assert rule.id in ids([Member("bystander", "solver", frozenset()), *reversed(chain)]), "order must not matter"
    if rule.verdict is Verdict.FORBID:
        with pytest.raises(RuleError) as raised:
            enforce(chain)
        assert rule.reason in str(raised.value) and f"rule {rule.id}" in str(raised.value)
        assert all(member.name in str(raised.value) for member in chain)
    else:
        assert rule.reason in " ".join(f.message for f in check(chain, [rule]))
        assert [f.rule.id for f in enforce(chain, [rule])] == [rule.id]


@pytest.mark.parametrize("rule", BOOK, ids=lambda r: r.id)
def test_rule_needs_every_member_and_every_word(rule: Rule) -> None:
    chain = triggering(rule)
    for index, member in enumerate(chain):
        rest = [*chain[:index], *chain[index + 1 :]]
        assert rule.id not in ids(rest, [rule])
        for word in member.words:
            weaker = Member(member.name, member.hook, member.words - {word})
            assert rule.id not in ids([*chain[:index], weaker, *chain[index + 1 :]], [rule])
        if any(w.startswith("hook:") for w in rule.parts[index]):
            elsewhere = Member(member.name, "another-hook", member.words)
            assert rule.id not in ids([*chain[:index], elsewhere, *chain[index + 1 :]], [rule])


@pytest.mark.parametrize("rule", BOOK, ids=lambda r: r.id)
def test_rule_is_complete(rule: Rule) -> None:
    assert rule.reason and rule.evidence and rule.parts
    words = {w for part in rule.parts for w in part if not w.startswith("hook:")}
    assert words <= EFFECT_WORDS.keys() | RUN_WORDS, "a rule over a word that nothing can say never matches"


def test_ids_are_unique() -> None:
    assert len({rule.id for rule in BOOK}) == len(BOOK)
    assert WITH_CONDITION.keys() == {rule.id for rule in BOOK if rule.when is not None}


@pytest.mark.parametrize(("texts", "expected"), [c[1:] for c in CHAINS], ids=[c[0] for c in CHAINS])
def test_chains(texts: list[str], expected: list[str]) -> None:
    assert sorted(ids(chain_of(texts))) == sorted(expected)


def test_members_are_distinct_even_when_equal() -> None:
    twins = [Member("twin", "cache", frozenset({"block-outputs"})) for _ in range(2)]
    assert ids(twins) == ["C36"], "two plugins that look the same are still two"


def test_three_members() -> None:
    rule = Rule("x", (frozenset({"a"}), frozenset({"b"}), frozenset({"a", "b"})), Verdict.WARN, "why", "test")
    member = {w: Member(w, "cache", frozenset(w)) for w in ("a", "b", "ab")}
    # The greedy choice, `ab` for the first part, would leave the third without a member.
    assert ids([member["ab"], member["a"], member["b"]], [rule]) == ["x"]
    assert ids([member["ab"], member["a"]], [rule]) == []


def test_a_condition_is_asked() -> None:
    rule = Rule("x", (frozenset({"a"}),), Verdict.WARN, "why", "test", when=lambda chain: len(chain) > 1)
    one = Member("one", "cache", frozenset({"a"}))
    assert ids([one], [rule]) == []
    assert ids([one, Member("two", "solver", frozenset())], [rule]) == ["x"]


def test_all_forbidding_rules_are_named_and_come_first() -> None:
    texts = ["cache denoiser-output step-reuse needs-deterministic-step", "solver stochastic-step multistep"]
    found = check(chain_of(texts))
    assert [f.rule.id for f in found] == ["C3", "D1", "C2"]
    with pytest.raises(RuleError, match=r"rule C3;.*rule D1;"):
        enforce(chain_of(texts))
