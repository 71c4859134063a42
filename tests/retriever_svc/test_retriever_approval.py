"""A public adapter that waits for approval can be named by every tenant and is chosen for its own tenant only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings, PageRequest, Retriever, Route, RouteRequest
from retriever_svc.doctor import examine
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, embedding_of, live_pool, names, record_of
from tests.retriever_svc.routing import TEMPERATURE

EAST, NORTH = (1.0, 0.0), (0.0, 1.0)
ENCODER = FakeEncoder({"east": EAST})
STRICT = IndexSettings(requires_approval=True)
BY_LISTS = IndexSettings(requires_approval=True, exact_rows=0, side_rows=0)
OPEN = IndexSettings()
POISON = record_of("poison", EAST, tenant="mallory", own_scores=(0.25,) * 5)
HONEST = record_of("honest", NORTH, tenant="acme")


def chosen(retriever: Retriever, tenant: str) -> list[str]:
    [route] = retriever.route([RouteRequest("east", tenant=tenant)])
    assert isinstance(route, Route)
    assert [candidate.ref.name for candidate in route.candidates] == names(route)
    return names(route)


def approved(record: AdapterRecord) -> AdapterRecord:
    return replace(record, approved=True)


@pytest.mark.parametrize("settings", [STRICT, BY_LISTS], ids=["exact", "lists"])
def test_only_an_approved_adapter_is_chosen_for_other_tenants(settings: IndexSettings) -> None:
    source = Source(POISON, approved(HONEST))
    pools = live_pool(ENCODER, source, settings=settings, background=lambda work: work())
    assert (pools.current.index.lists is not None) == (settings is BY_LISTS)
    retriever = Retriever(pools, min_score=-1.0, temperature=TEMPERATURE)
    assert chosen(retriever, "acme") == ["honest"]
    assert chosen(retriever, "mallory") == ["poison", "honest"]
    assert [c.ref.name for c in retriever.neighbours(embedding_of(EAST), 5, "acme")] == ["honest"]
    assert retriever.plan_named("acme", [("poison", 1.0)]).adapters[0].ref == POISON.ref  # it answers if named
    assert {record.ref.name for _, record in retriever.page("acme", PageRequest(9)).rows} == {"honest", "poison"}
    source.commit(approved(POISON), approved(HONEST))
    pools.catch_up()
    assert chosen(retriever, "acme") == ["poison", "honest"]
    source.commit(POISON, approved(HONEST))  # an update without review
    pools.catch_up()
    assert chosen(retriever, "acme") == ["honest"]


def test_without_the_setting_every_public_adapter_is_chosen() -> None:
    assert chosen(
        Retriever(live_pool(ENCODER, Source(POISON, HONEST), settings=OPEN), temperature=TEMPERATURE), "acme"
    ) == ["poison", "honest"]


def test_the_doctor_queries_only_adapters_that_may_be_chosen() -> None:
    pool = live_pool(ENCODER, Source(POISON, approved(HONEST)), settings=STRICT).current
    *_, last = examine(pool, "acme", lambda record: [Sample("east")])
    assert last.report is not None
    assert [finding.ref.name for finding in last.report.adapters] == ["honest"]
    assert last.report.never_chosen == ()
