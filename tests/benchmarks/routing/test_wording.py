from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.paper.retrieval.ranking import retriever_of
from benchmarks.routing.wording import Choice, calibration_error, measure, outcome_of, route_of
from benchmarks.routing.wording_pools import Prompt, WordedAdapter, WordedPool, read_everyday, read_pools
from retriever_svc import Encoder


def small(pool: WordedPool, num_adapters: int, *kinds: str) -> WordedPool:
    """Return the pool with its first adapters, with two prompts of each adapter and kind, and two neighbours."""
    adapters = pool.adapters[:num_adapters]
    names = {adapter.name for adapter in adapters}
    kept: list[Prompt] = []
    for prompt in pool.of_kind(*kinds):
        alike = [other for other in kept if (other.kind, other.own) == (prompt.kind, prompt.own)]
        if (prompt.own is None or prompt.own in names) and len(alike) < 2:
            kept.append(prompt)
    return WordedPool(pool.name, adapters, tuple(kept))


def test_a_small_pool_is_measured_in_every_part(projected: Encoder) -> None:
    pool = small(read_pools("tune")[0], 4, "same", "para", "neighbour")
    everyday = read_everyday("tune")
    some = [*[p for p in everyday if p.kind == "everyday"][:4], *[p for p in everyday if p.kind == "everyday_chat"][:2]]
    choices = measure(pool, some, "three", projected)
    assert [choice.prompt for choice in choices] == [*pool.prompts, *some]
    outcome = outcome_of(pool, "three", choices)
    assert (outcome.pool, outcome.samples, outcome.adapters) == (pool.name, "three", 4)
    assert outcome.same_right >= 0.75 and outcome.first >= 0.75
    assert outcome.right <= min(outcome.first, 1)
    assert 0 <= outcome.everyday_away <= 1 and 0 <= outcome.calibration_error <= 1
    never = measure(pool, some, "three", projected, "never")
    assert all(choice.is_kept for choice in never)


@pytest.mark.parametrize("name", ["word_forms", "lookups"])
def test_adapters_of_bare_words_are_found_by_them_and_everyday_words_are_not(projected: Encoder, name: str) -> None:
    [pool] = [pool for pool in read_pools("tune_words") if pool.name == name]
    outcome = outcome_of(pool, "one", measure(pool, read_everyday("tune_words"), "one", projected))
    assert outcome.right >= 0.85 * outcome.first, outcome
    assert outcome.everyday_away >= 0.95, outcome


def choice(kind: str, own: str | None = "a", *, first: bool = True, kept: bool = True, margin: float = 0.0) -> Choice:
    return Choice(Prompt(kind, "text", own), first, kept, margin, 0.5)


def test_shares_are_of_the_prompts_of_their_kind() -> None:
    pool = WordedPool("p", (WordedAdapter("a", "d", ("{input}",), ("x",)),), ())
    choices = [
        *[choice("para", margin=0.3), choice("para", first=False), choice("typo", kept=False, margin=0.1)],
        *[choice("same"), choice("same", kept=False)],
        *[choice("neighbour", None, margin=0.2), choice("neighbour", None, kept=False, margin=-0.1)],
        *[choice("everyday", None, kept=False, margin=-0.2)] * 3,
        choice("everyday_chat", None),
        *[choice("context"), choice("context_last", kept=False), choice("agent"), choice("followup", first=False)],
    ]
    found = outcome_of(pool, "one", choices)
    assert (found.first, found.right) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (found.same_kept, found.same_right, found.neighbours_away) == (0.5, 0.5, 0.5)
    assert (found.everyday_away, found.chats_away) == (1.0, 0.0)
    assert (found.context, found.agent, found.followup) == (1.0, 2.0, 0.0)  # per right prompts without other text: 1/2
    assert (found.everyday_auroc, found.neighbours_auroc) == (1.0, 0.75)


def test_the_calibration_error_weighs_both_kinds_alike() -> None:
    sure = [replace(choice("para"), confidence=0.95)] * 3
    wrong = [replace(choice("everyday", None, first=False), confidence=0.05)]
    assert calibration_error(sure, wrong) == pytest.approx(0.05)
    assert calibration_error([replace(row, is_first=False) for row in sure], wrong) == pytest.approx(0.5)


def test_a_follow_up_gets_the_choice_for_the_turn_before_it(projected: Encoder) -> None:
    pool = read_pools("tune")[0]
    adapter = pool.adapters[0]
    retriever = retriever_of({adapter.name: adapter.samples("three")}, projected)
    [own, *_] = [prompt for prompt in pool.of_kind("same") if prompt.own == adapter.name]
    asked = Prompt("followup", "Can you make that a little friendlier?", adapter.name, previous=own.text)
    route = route_of(retriever, asked, "balanced")
    assert [row.ref.name for row in route.plan.adapters] == [adapter.name]
    assert route_of(retriever, replace(asked, previous="What is the capital of France?"), "balanced").abstained
