"""The Retriever's use of its pool: kept versions, thresholds from the pool's samples, real tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_store.adapter import LOCAL_TENANT, Sample
from lora_store.errors import AdapterNotFound
from lora_store.records import AdapterRecord
from retriever_svc import NoAdapterMatched, Retriever, RouteRequest, embed_groups
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, embedding_of, live_pool, record_of
from tests.retriever_svc.routing import EAST, NORTH, POOL, TABLE, retriever_of, route_one


def kept_versions(*visibilities: str) -> tuple[AdapterRecord, ...]:
    """Return the versions of one name, the live one first."""
    return tuple(
        record_of("n", NORTH, tenant="a", version=str(n), visibility=visibility)
        for n, visibility in enumerate(visibilities)
    )


def retriever_with_history(*versions: AdapterRecord) -> Retriever:
    source = Source()
    source.commit(versions[0], previous={("a", "n"): versions[1:]})
    return Retriever(live_pool(FakeEncoder(TABLE), source))


def test_a_digest_also_names_kept_versions() -> None:
    versions = kept_versions("public", "public", "public")
    retriever = retriever_with_history(*versions)
    for version in versions:
        assert retriever.resolve("a", f"n@{version.ref.digest[:8]}") == version
        plan = retriever.plan_named("b", [(f"a/n@{version.ref.digest}", 1.0)])
        assert [adapter.ref for adapter in plan.adapters] == [version.ref]
    assert retriever.resolve("a", "n") == versions[0]
    assert retriever.versions("b", "n") == (2, list(versions))


def test_a_version_that_was_private_stays_private() -> None:
    versions = kept_versions("public", "private")
    retriever = retriever_with_history(*versions)
    assert retriever.resolve("a", f"n@{versions[1].ref.digest}") == versions[1]
    assert retriever.versions("a", "n") == (2, list(versions))
    assert retriever.versions("b", "n") == (2, [versions[0]])
    with pytest.raises(AdapterNotFound):
        retriever.resolve("b", f"a/n@{versions[1].ref.digest}")


def test_a_withdrawn_adapter_has_no_versions() -> None:
    with pytest.raises(AdapterNotFound):
        retriever_of(*POOL).versions(LOCAL_TENANT, "gone")


SAMPLES = {"e": ("east", "northeast") * 3, "n": ("north", "northeast", "north") * 2, "secret": ("east", "west") * 3}


def sampled(name: str, **fields: Any) -> AdapterRecord:
    """Return an adapter whose scores are those of its samples."""
    [embedding] = embed_groups(FakeEncoder(TABLE), [[Sample(text) for text in SAMPLES[name]]])
    assert embedding is not None
    return replace(record_of(name, None, **fields), embedding=embedding)


def test_a_configured_min_score_overrides_the_samples() -> None:
    assert not route_one(retriever_of(sampled("e"), min_score=0.2)).abstained
    [error] = retriever_of(sampled("e"), min_score=0.99).route([RouteRequest("north", fallback="error")])
    assert isinstance(error, NoAdapterMatched)
    assert error.threshold == 0.99


def test_no_samples_no_embedding() -> None:
    assert retriever_of().embed_groups([[], [Sample("east")]])[0] is None


def test_an_embedding_by_another_encoder_has_no_neighbours_here() -> None:
    retriever = retriever_of(*POOL)
    assert [c.ref.name for c in retriever.neighbours(embedding_of(EAST), 2, LOCAL_TENANT)] == ["e", "ne"]
    assert retriever.neighbours(embedding_of((1.0, 0.0, 0.0), encoder="another"), 2, LOCAL_TENANT) == ()
