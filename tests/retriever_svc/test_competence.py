from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, OutputProfile
from retriever_svc.competence import (
    MAX_EXAMPLES,
    MAX_NEAR,
    MAX_WITHOUT_SAMPLES,
    Region,
    evaluate,
    find_regions,
    is_clearly_better,
    rank,
)
from retriever_svc.index import IndexSettings
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

EAST, NORTH = (1.0, 0.0), (0.0, 1.0)
LABELS = OutputProfile(("no", "yes"))
SAMPLES = [Sample(f"question {number}", ("yes", "no")[number % 2]) for number in range(20)]


def adapter(
    name: str, vector: Sequence[float] | None = EAST, labels: OutputProfile | None = LABELS, **fields: object
) -> AdapterRecord:
    record = record_of(name, vector, num_samples=0 if vector is None else 20, **fields)
    return record if record.embedding is None else replace(record, embedding=replace(record.embedding, outputs=labels))


class Answers:
    """Scores adapters by a table: the share of examples that each answers rightly, the same ones each time."""

    def __init__(self, right: Mapping[str, float], away: Sequence[str] = ()) -> None:
        self.right, self.asked, self.away = right, dict.fromkeys(right, 0), away

    async def can_score(self, adapter: AdapterRecord) -> bool:
        return adapter.ref.name not in self.away

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        self.asked[adapter.ref.name] += len(examples)
        limit = round(self.right[adapter.ref.name] * 20)
        return [float(int(example.input.split()[1]) < limit) for example in examples]


def regions(
    *records: AdapterRecord,
    given: Mapping[str, list[Sample]] | None = None,
    tenant: str = "local",
    approval: bool = False,
) -> list[Region]:
    pool = Pool.of(snapshot_of(*records), FakeEncoder({}), IndexSettings(requires_approval=approval))
    known = {} if given is None else given
    return list(find_regions(pool, tenant, lambda record: known.get(record.ref.name, SAMPLES)))


def evaluated(found: Sequence[Region], right: Mapping[str, float]) -> list[Ranking]:
    async def run() -> list[Ranking]:
        return [ranking async for ranking in evaluate(found, Answers(right)) if isinstance(ranking, Ranking)]

    return asyncio.run(run())


def beaten(ranking: Ranking) -> list[str]:
    return [item.ref.name for item in ranking.adapters if item.is_beaten]


def test_a_region_has_near_adapters_and_those_without_samples() -> None:
    near, far, bare = adapter("near", (0.96, 0.28)), adapter("far", NORTH), adapter("bare", None)
    [first, *_] = regions(adapter("a"), near, far, bare)
    assert [record.ref.name for record in first.candidates] == ["a", "near", "bare"]
    assert len(first.examples) == 20
    for cosine, num in ((0.66, 2), (0.64, 1)):  # as near as two adapters of one task is near enough to compete
        [first, _] = regions(adapter("a"), adapter("b", (cosine, (1 - cosine**2) ** 0.5)))
        assert len(first.candidates) == num


def test_only_adapters_with_outputs_have_a_region_and_examples_are_bounded() -> None:
    many = [Sample(f"question {number}", "yes") for number in range(100)]
    given = {"plain": [Sample("question", None)] * 20, "few": SAMPLES[:3], "many": many}
    [only] = regions(adapter("plain"), adapter("few"), adapter("many", NORTH), given=given)
    assert (only.anchor.ref.name, len(only.examples)) == ("many", MAX_EXAMPLES)
    [region] = regions(adapter("a"), *(adapter(f"bare-{number:03}", None) for number in range(100)))
    assert len(region.candidates) == 1 + MAX_WITHOUT_SAMPLES


def test_samples_are_read_when_their_region_is_asked_for() -> None:
    records, read = [adapter(f"a{n}", axis) for n, axis in enumerate(np.eye(10, dtype=np.float32))], list[str]()

    def source(record: AdapterRecord) -> Sequence[Sample]:
        read.append(record.ref.name)
        return SAMPLES

    pool = Pool.of(snapshot_of(*records), FakeEncoder({}, dim=10), IndexSettings())
    assert next(find_regions(pool, "local", source)).anchor == records[0]
    assert read == ["a0"]


def test_strangers_adapters_take_no_place_of_own_or_approved_ones() -> None:
    crowd = [adapter(f"bare-{n}", None, tenant="aaa") for n in range(MAX_WITHOUT_SAMPLES)]
    copies = [adapter(f"copy-{n}", EAST, tenant="aaa") for n in range(MAX_NEAR + 1)]
    own, approved = adapter("own-bare", None), adapter("approved-bare", None, tenant="b", approved=True)
    twin = adapter("twin", (0.96, 0.28))
    region = regions(adapter("a"), twin, own, approved, *crowd, *copies)[0]
    names = [record.ref.name for record in region.candidates]
    assert {"twin", "own-bare", "approved-bare"} <= set(names)
    assert sum(name.startswith("copy") for name in names) == MAX_NEAR
    assert sum(name.startswith("bare") for name in names) == MAX_WITHOUT_SAMPLES - 2


def test_another_tenants_adapter_gives_examples_only_if_an_admin_approved_it() -> None:
    own, rival = adapter("own"), adapter("rival", (0.96, 0.28), tenant="rival")
    assert [region.anchor.ref.name for region in regions(own, rival)] == ["own"]
    approved = adapter("rival", (0.96, 0.28), tenant="rival", approved=True)
    assert [region.anchor.ref.name for region in regions(own, approved)] == ["rival", "own"]


def test_an_adapter_that_auto_may_not_choose_or_is_unlisted_does_not_compete() -> None:
    bare = adapter("bare", None)
    expires = bare.created_at.replace(year=2100)
    unlisted = [replace(adapter(f"brief-{one}", None, tenant=one), expires_at=expires) for one in ("local", "b")]
    private = adapter("secret", tenant="rival", visibility="private")
    unapproved = adapter("new", tenant="rival")
    [region] = regions(adapter("own"), bare, *unlisted, private, unapproved, approval=True)
    assert [record.ref.name for record in region.candidates] == ["own", "bare"]


def test_a_poisoned_copy_of_another_tenant_is_beaten_by_the_own_adapter() -> None:
    found = regions(adapter("own"), adapter("poison", (0.96, 0.28), tenant="rival"))
    [ranking] = evaluated(found, {"own": 0.9, "poison": 0.1})
    assert beaten(ranking) == ["poison"]


def test_the_older_or_the_approved_one_of_two_contradicting_adapters_wins() -> None:
    original = adapter("original")
    flipped = replace(adapter("flipped", (0.96, 0.28)), created_at=original.created_at.replace(year=2025))
    [ranking] = evaluated(regions(flipped, original), {"original": 0.9, "flipped": 0.1})
    assert (ranking.anchor.name, beaten(ranking)) == ("original", ["flipped"])
    approved = replace(flipped, approved=True)
    [first, *_] = regions(approved, original)
    assert first.anchor.ref.name == "flipped"


def test_a_near_adapter_with_another_function_is_not_judged_by_foreign_examples() -> None:
    copy, reverse = adapter("copy", labels=None), adapter("reverse", (0.99, 0.14), labels=None)
    found = regions(copy, reverse)
    assert [region.judged for region in found] == [{copy.ref}, {reverse.ref}]
    [first, *_] = evaluated(found, {"copy": 0.9, "reverse": 0.0})
    assert beaten(first) == []


def test_an_adapter_without_samples_is_ranked_if_it_is_not_clearly_worse_than_the_best() -> None:
    found = regions(adapter("own"), adapter("twin", None), adapter("bad", None))
    [ranking] = evaluated(found, {"own": 0.95, "twin": 0.9, "bad": 0.2})
    assert {item.ref.name: item.is_beaten for item in ranking.adapters} == {"own": False, "twin": False}
    np.testing.assert_array_equal(ranking.vector, np.asarray(EAST, np.float32))
    [ranking] = evaluated(regions(adapter("own"), adapter("twin", None)), {"own": 0.3, "twin": 0.95})
    assert [(item.ref.name, item.is_beaten) for item in ranking.adapters] == [("twin", False), ("own", True)]


@pytest.mark.parametrize("right", [{"own": 0.0, "twin": 0.2}, {"own": 0.0, "twin": 0.0}])
def test_no_adapter_leads_where_all_answer_badly(right: dict[str, float]) -> None:
    assert evaluated(regions(adapter("own"), adapter("twin", None)), right) == []


async def test_a_region_that_cannot_be_scored_now_is_left_out_and_named() -> None:
    scorer = Answers({"a": 0.9, "b": 0.2}, away=["a"])
    first, second = [found async for found in evaluate(regions(adapter("a"), adapter("b")), scorer)]
    assert first == adapter("a").ref and isinstance(second, Ranking) and second.anchor == adapter("b").ref


async def test_an_anchor_without_rivals_is_not_measured() -> None:
    answers = Answers({"own": 1.0})
    [region] = regions(adapter("own"))
    assert await rank(region, answers) is None
    assert answers.asked == {"own": 0}


async def test_halving_asks_less_than_everybody_everything_and_finds_the_same_best() -> None:
    names = [f"bare-{number}" for number in range(16)]
    right = {"own": 0.5} | {name: number / 20 for number, name in enumerate(names)} | {"bare-7": 1.0}
    answers = Answers(right)
    [region] = regions(adapter("own"), *(adapter(name, None) for name in names))
    ranking = await rank(region, answers)
    assert ranking is not None and ranking.adapters[0].ref.name == max(right, key=right.__getitem__)
    assert answers.asked["own"] == 20
    assert sum(answers.asked.values()) < 20 * len(right) * 0.6


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0] * 8, [0.0] * 8, True),
        ([1.0] * 8, [1.0] * 8, False),
        ([1.0, 0.0] * 4, [0.0, 1.0] * 4, False),
        ([1.0] * 20, [1.0] * 17 + [0.0] * 3, False),
        ([1.0] * 20, [1.0] * 14 + [0.0] * 6, True),
        ([1.0], [0.0], False),
        ([1.0] * 4 + [0.0] * 16, [0.0] * 4, True),
    ],
)
def test_clearly_better_means_a_large_and_certain_difference(
    first: list[float], second: list[float], expected: bool
) -> None:
    assert is_clearly_better(first, second) is expected
