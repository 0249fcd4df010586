"""Rules of composition: predicates over the words of the active chain, each with its reason and evidence.

A rule never names a plugin. Its parts are sets of words, matched by distinct members of the chain, so a
rule over three members is written like a rule over one, and a third-party plugin obeys it unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from suite.errors import RuleError


class Verdict(StrEnum):
    """What a matching rule does."""

    FORBID = "forbid"
    WARN = "warn"


@dataclass(frozen=True)
class Member:
    """One member of the chain: a plugin, the solver's facts, or the run itself (`steps`, `guidance`, model)."""

    name: str
    hook: str
    words: frozenset[str]


@dataclass(frozen=True)
class Rule:
    """A rule of the book.

    Attributes:
        id: row of the composition table, or a name of its own.
        parts: one set of words a member; every word of a set must be among the member's words. A word
            may be a hook in the form `hook:cache`.
        verdict: forbid or warn.
        reason: what goes wrong, and what to do instead.
        evidence: measured, paper, issue or reasoning.
        when: a further condition on the whole chain.
    """

    id: str
    parts: tuple[frozenset[str], ...]
    verdict: Verdict
    reason: str
    evidence: str
    when: Callable[[Sequence[Member]], bool] | None = None


@dataclass(frozen=True)
class Finding:
    """A rule that matched, and the members that it matched."""

    rule: Rule
    members: tuple[Member, ...]

    @property
    def message(self) -> str:
        """One line: who, why, rule."""
        names = " with ".join(m.name for m in self.members)
        return f"{names}: {self.rule.reason} (rule {self.rule.id}; {self.rule.evidence})"


def _rule(
    id: str,
    parts: Sequence[str],
    verdict: Verdict,
    reason: str,
    evidence: str,
    when: Callable[[Sequence[Member]], bool] | None = None,
) -> Rule:
    return Rule(id, tuple(frozenset(p.split()) for p in parts), verdict, reason, evidence, when)


def _not_nested(chain: Sequence[Member]) -> bool:
    """Whether two caches of block outputs are anything but one pair that may be nested.

    Frozen outputs do not age, so they may stand inside of stages that are reused: the lags of both do not add up.
    """
    words = [m.words for m in chain if m.hook == "cache" and "block-outputs" in m.words]
    frozen, stages = ([w for w in words if word in w] for word in ("frozen-outputs", "stage-outputs"))
    return not (len(words) == 2 and len(frozen) == len(stages) == 1 and frozen != stages)


BOOK: tuple[Rule, ...] = (
    _rule(
        "C2",
        ["hook:cache denoiser-output", "multistep"],
        Verdict.WARN,
        "a reused or forecast output enters the solver's history and caps its order; use a one-step solver, "
        "or a forecast of order at least the solver's order - 1",
        "measured on an analytic target",
    ),
    _rule(
        "C3",
        ["denoiser-output step-reuse", "stochastic-step"],
        Verdict.FORBID,
        "a reused denoiser output does not see the solver's fresh noise, so its variance is never removed "
        "(output variance off by up to 284x in the exact Gaussian case); use a deterministic solver, or a cache "
        "of block outputs",
        "measured on an analytic target",
    ),
    _rule(
        "C3b",
        ["block-outputs step-reuse", "stochastic-step"],
        Verdict.WARN,
        "reused block outputs see the fresh noise only through the blocks that still run; prefer a deterministic "
        "solver, or a shorter interval",
        "issue reports",
    ),
    _rule(
        "C4",
        ["step-reuse", "few-step"],
        Verdict.WARN,
        "with fewer than 8 steps neighbouring steps differ too much to be reused; take more steps or drop the cache",
        "issue reports",
    ),
    _rule(
        "C6",
        ["branch-axis", "dynamic-decision"],
        Verdict.FORBID,
        "each rank holds one guidance branch and would decide alone when to skip; use a static interval",
        "library source",
    ),
    _rule(
        "C7",
        ["patch-axis", "dynamic-decision"],
        Verdict.FORBID,
        "ranks that decide differently wait for different collectives and hang; use a static interval",
        "library source",
    ),
    _rule(
        "C8",
        ["pipeline-stages", "step-reuse"],
        Verdict.FORBID,
        "patches are at different freshness, so what a skip means is undefined",
        "library documentation",
    ),
    _rule(
        "C9",
        ["pipeline-stages", "patch-axis"],
        Verdict.FORBID,
        "a rank of the sequence holds its share of the fresh keys and the next step needs all of them; use one of the "
        "two, or one plugin that does both and copies the keys",
        "library documentation",
    ),
    _rule(
        "C10",
        ["stale-activations", "step-reuse"],
        Verdict.WARN,
        "both assume neighbours in time: the lag is their sum; refresh buffers on full steps only",
        "reasoning",
    ),
    _rule(
        "C11",
        ["stale-activations", "few-step"],
        Verdict.FORBID,
        "the first steps must exchange fresh activations (4 by default), so with fewer than 8 nothing is gained; take "
        "more steps, or another way to use the ranks",
        "library source",
    ),
    _rule(
        "C12",
        ["trajectory batch-axis", "step-reuse"],
        Verdict.FORBID,
        "a parallel-in-time sampler evaluates the same time repeatedly with changing inputs",
        "reasoning",
    ),
    _rule(
        "C13",
        ["trajectory batch-axis", "stochastic-step"],
        Verdict.FORBID,
        "each sweep of a parallel-in-time sampler would draw other noise and never converge; use a deterministic "
        "solver",
        "library source",
    ),
    _rule(
        "C14",
        ["trajectory batch-axis", "multistep"],
        Verdict.FORBID,
        "a parallel-in-time sampler steps all times at once, and a solver's history belongs to one time after the "
        "other; use a one-step solver",
        "library source",
    ),
    _rule(
        "C15",
        ["trajectory batch-axis", "branch-axis"],
        Verdict.WARN,
        "both spend the batch axis; depth falls less than the number of evaluations grows",
        "reasoning",
    ),
    _rule(
        "C24",
        ["guidance-distilled", "guided"],
        Verdict.FORBID,
        "the model has guidance inside; adding classifier-free guidance doubles it: set --guidance 1",
        "library documentation",
    ),
    _rule(
        "C24b",
        ["branch-axis", "unguided"],
        Verdict.FORBID,
        "there is only one branch to place: --guidance is 1",
        "library documentation",
    ),
    _rule(
        "C24c",
        ["negative-prompt", "unguided"],
        Verdict.WARN,
        "the negative prompt does nothing: it acts through guidance, and --guidance is 1; raise it if the model is "
        "meant to be guided, or drop the negative prompt",
        "by construction",
    ),
    _rule(
        "C25",
        ["ends-guidance", "branch-axis"],
        Verdict.FORBID,
        "each rank holds one guidance branch: none can keep what both give, and when guidance ends all but one idle; "
        "run in one process, or end guidance by time with --guidance-interval",
        "library source",
    ),
    _rule(
        "C25b",
        ["ends-guidance", "negative-prompt"],
        Verdict.WARN,
        "the negative prompt acts only until guidance ends; let it end later, or drop the negative prompt",
        "library source",
    ),
    _rule(
        "C27",
        ["optimised-grid", "step-reuse"],
        Verdict.WARN,
        "the grid was fitted without reuse, and its uneven gaps change the error of a step interval",
        "paper",
    ),
    _rule(
        "C29",
        ["time-jumps", "step-reuse"],
        Verdict.FORBID,
        "going back to a noisier time makes what was stored stale",
        "reasoning",
    ),
    _rule(
        "C31",
        ["hook:cache stage-outputs", "side-residuals"],
        Verdict.WARN,
        "residuals of another network enter stages that a reused step does not run, so every evaluation with them is "
        "computed as a whole; expect no saving while they act",
        "reasoning",
    ),
    _rule(
        "C33",
        ["step-reuse", "distill"],
        Verdict.FORBID,
        "score distillation draws times and cameras at random: neighbouring steps have nothing in common",
        "reasoning",
    ),
    _rule(
        "C33b",
        ["trajectory-store", "distill"],
        Verdict.FORBID,
        "the states of a distillation are noised views of a scene that changes; there is no trajectory to resume",
        "reasoning",
    ),
    _rule(
        "N1",
        ["trajectory-store", "step-reuse"],
        Verdict.FORBID,
        "rows of a batch that resume at different steps are run one after the other, and what is kept of the first "
        "would be reused for the next; use one of the two",
        "reasoning",
    ),
    _rule(
        "C28",
        ["trajectory-store", "multistep"],
        Verdict.WARN,
        "a resumed trajectory has no history, so its first step is of order 1 and not the one that was stored; "
        "prefer a one-step solver",
        "issue reports",
    ),
    _rule(
        "C36",
        ["hook:cache block-outputs", "hook:cache block-outputs"],
        Verdict.FORBID,
        "two caches would replace the same block outputs; keep one",
        "library source",
        when=_not_nested,
    ),
    _rule(
        "C36b",
        ["hook:cache denoiser-output", "hook:cache denoiser-output"],
        Verdict.FORBID,
        "two caches would replace the same denoiser output; keep one",
        "library source",
    ),
    _rule(
        "C38",
        ["adaptive-grid", "needs-fixed-grid"],
        Verdict.FORBID,
        "the solver picks its own times, so there is no grid to follow",
        "reasoning",
    ),
    _rule(
        "C38c",
        ["adaptive-grid", "step-reuse"],
        Verdict.FORBID,
        "the solver picks its own times within one step of the engine, so a cache has no steps to count",
        "reasoning",
    ),
    _rule(
        "C38b",
        ["adaptive-grid", "optimised-grid"],
        Verdict.FORBID,
        "the solver picks its own times and would ignore the optimised grid",
        "reasoning",
    ),
    _rule(
        "S1",
        ["denoiser-switch", "hook:cache denoiser-output step-reuse"],
        Verdict.WARN,
        "what is reused or forecast across the switch is another network's answer; prefer a cache of block outputs, "
        "which belong to one network",
        "reasoning",
    ),
    _rule(
        "S2",
        ["counts-steps", "distill"],
        Verdict.FORBID,
        "score distillation draws its times, so a run has no first and last steps; use a method that goes by the time",
        "reasoning",
    ),
    _rule(
        "T1",
        ["needs-tokens", "real-vectors"],
        Verdict.FORBID,
        "it goes by which tokens have changed, but this model is over real vectors, all of which change at every step",
        "reasoning",
    ),
    _rule(
        "D1",
        ["needs-deterministic-step", "stochastic-step"],
        Verdict.FORBID,
        "the method is wrong with a solver that draws noise",
        "declared by the plugin",
    ),
)


def check(chain: Sequence[Member], rules: Iterable[Rule] = BOOK) -> list[Finding]:
    """All rules that match the chain, forbidding ones first."""
    findings = [Finding(r, m) for r in rules if (m := _match(r, chain)) and (r.when is None or r.when(chain))]
    return sorted(findings, key=lambda f: f.rule.verdict is not Verdict.FORBID)


def enforce(chain: Sequence[Member], rules: Iterable[Rule] = BOOK) -> list[Finding]:
    """The warnings.

    Raises:
        RuleError: a forbidding rule matches; every one that does is named.
    """
    findings = check(chain, rules)
    forbidden = [f for f in findings if f.rule.verdict is Verdict.FORBID]
    if forbidden:
        raise RuleError("; ".join(f.message for f in forbidden))
    return findings


def _match(rule: Rule, chain: Sequence[Member]) -> tuple[Member, ...] | None:
    """Distinct members for the rule's parts, or None; a small backtracking search."""

    def search(index: int, used: tuple[int, ...]) -> tuple[int, ...] | None:
        if index == len(rule.parts):
            return used
        for position, member in enumerate(chain):
            if position in used:
                continue
            if rule.parts[index] <= member.words | {f"hook:{member.hook}"}:
                if found := search(index + 1, (*used, position)):
                    return found
        return None

    found = search(0, ())
    return tuple(chain[position] for position in found) if found else None
