"""How accepted prompts change the reading of a tenant's prompts, and what they cannot do."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings
from retriever_svc.calibration import MARGINS, handicaps_at
from retriever_svc.encoder import unit_rows
from retriever_svc.ordinary_prompts import nearness, nearness_to_others
from retriever_svc.pool import Pool
from retriever_svc.rewording import (
    AS_WRITTEN,
    LEAST_RISE,
    MAX_GAP,
    MAX_PER_ADAPTER,
    MAX_PROMPTS,
    Rewording,
    accepted_prompts,
)
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

DIM = 6
ORDINARY = unit_rows(np.asarray([[0, 0, 0, 0, 1, 0.1 * step] for step in range(8)], np.float32))


def random_rows(num: int, dim: int = DIM, seed: int = 7) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32))


def at(degrees: float) -> np.ndarray:
    """Return the unit vector at this angle in the plane of the first two axes."""
    vector = np.zeros(DIM, np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector


def taught(name: str, degrees: float, *prompts: float, age_h: int = 0, tenant: str = "local") -> AdapterRecord:
    """Return an adapter at an angle, with accepted prompts at others."""
    record = record_of(name, at(degrees), tenant=tenant)
    assert record.embedding is not None
    accepted = np.stack([at(prompt) for prompt in prompts]) if prompts else None
    created_at = record.created_at - timedelta(hours=age_h)
    return replace(record, embedding=replace(record.embedding, accepted=accepted), created_at=created_at)


def pool_of(*records: AdapterRecord, centre: np.ndarray | None = None) -> Pool:
    return Pool.of(snapshot_of(*records), FakeEncoder({}, DIM), IndexSettings(), ordinary=ORDINARY, centre=centre)


@pytest.mark.parametrize("num", [1, 4, 20])
def test_prompts_are_read_by_the_ridge_regression_of_the_accepted_ones(num: int) -> None:
    prompts, adapters, queries = random_rows(num), random_rows(num, seed=8), random_rows(5, seed=9)
    rewording = Rewording.fit(prompts, adapters, ORDINARY)
    matrix = np.linalg.inv(prompts.T @ prompts + 5 * np.eye(DIM)) @ prompts.T @ (adapters - prompts)
    np.testing.assert_allclose(rewording.read(queries), unit_rows(queries + queries @ matrix), atol=1e-5)
    assert np.array_equal(rewording.read(queries[2:3]), rewording.read(queries)[2:3]), "a row depends on no other row"


def test_without_accepted_prompts_every_prompt_is_read_as_it_is_written() -> None:
    queries = random_rows(3)
    assert AS_WRITTEN.read(queries) is queries
    pool = pool_of(taught("a", 0))
    assert pool.rewording("local") is AS_WRITTEN


def test_a_prompt_like_accepted_ones_is_read_nearer_to_their_adapter() -> None:
    pool = pool_of(taught("a", 0, 30, 50), taught("b", 120))
    [read] = pool.rewording("local").read(at(40)[np.newaxis])
    assert at(40) @ at(0) + 0.05 < read @ at(0)


def test_accepted_prompts_change_the_reading_for_their_own_tenant_only() -> None:
    pool = pool_of(taught("a", 0, 30, tenant="acme"), taught("b", 120, tenant="other"))
    assert len(pool.rewording("acme").prompts) == 1
    assert pool.rewording("other") is AS_WRITTEN


def test_a_prompt_that_another_adapter_answers_and_fits_clearly_better_does_not_count() -> None:
    """So a false name for the prompts of another adapter says nothing."""
    nearly = next(angle for angle in range(60, 0, -1) if at(angle) @ at(120) - at(angle) @ at(0) <= MAX_GAP)
    pool = pool_of(taught("liar", 0, nearly, nearly + 8, 110), taught("victim", 120))
    np.testing.assert_allclose(pool.rewording("local").prompts, [at(nearly)], atol=1e-6)


def test_a_prompt_that_no_adapter_answers_counts() -> None:
    pool, asked = pool_of(taught("near", 0), taught("named", 120, -110)), at(-110)[np.newaxis]
    [matches] = pool.judged(pool.nearest(asked, 2, "local"), "balanced", asked)
    assert [(match.record.ref.name, match.fits) for match in matches] == [("near", False), ("named", False)]
    assert len(pool.rewording("local").prompts) == 1


def test_without_a_projection_prompts_are_read_as_they_are_written() -> None:
    assert pool_of(taught("a", 0, 30), centre=ORDINARY.mean(axis=0)).rewording("local") is AS_WRITTEN


def test_the_newest_prompts_count_few_of_each_adapter_and_a_bounded_number_of_a_tenant() -> None:
    own = [taught(f"a{hours}", hours, *range(hours, hours + 9), age_h=hours) for hours in reversed(range(40))]
    pairs = accepted_prompts(own)
    assert len(pairs) == MAX_PROMPTS
    assert [np.degrees(np.arctan2(p[1], p[0])).round() for p, _ in pairs[:7]] == [0, 1, 2, 3, 4, 1, 2]
    assert MAX_PER_ADAPTER == 5


def test_no_more_ordinary_prompts_than_before_reach_an_adapter() -> None:
    """Accepted prompts beside ordinary ones would open the pool for these."""
    ordinary = random_rows(60, 30)
    prompts = ordinary[:6]
    near, adapter = nearness_to_others(ordinary), unit_rows(0.25 * prompts.sum(axis=0) + random_rows(1, 30, seed=3)[0])
    rewording = Rewording.fit(prompts, np.stack([adapter] * 6), ordinary)
    [handicap] = handicaps_at(nearness(adapter[np.newaxis], ordinary))

    def answered(rows: np.ndarray, rise: float) -> int:
        margins = [row @ adapter - own - handicap for row, own in zip(rows, near, strict=True)]
        return sum(margin >= MARGINS["balanced"] + rise for margin in margins)

    before, read = answered(ordinary, 0.0), rewording.read(ordinary)
    assert answered(read, 0.0) > before
    assert answered(read, rewording.rise) == before
    assert answered(read, rewording.rise - LEAST_RISE - 1e-4) > before, "and thresholds rise no more than that needs"


def test_a_later_generation_has_the_accepted_prompts_of_its_adapters() -> None:
    first = pool_of(taught("a", 0, 30), taught("b", 120))
    added = first.after(replace(first.snapshot, records={**first.snapshot.records, **records(taught("c", 60, 70))}))
    assert sorted(name for _, name in added.taught) == ["a", "c"]
    undone = added.after(replace(added.snapshot, records={**added.snapshot.records, **records(other_version("a"))}))
    assert sorted(name for _, name in undone.taught) == ["c"]
    assert undone.rebuilt(undone.index.compacted(), undone).taught == undone.taught
    assert first.rewording("local") is not AS_WRITTEN


def records(record: AdapterRecord) -> dict[tuple[str, str], AdapterRecord]:
    return {(record.ref.tenant, record.ref.name): record}


def other_version(name: str) -> AdapterRecord:
    return record_of(name, at(0), version="2")
