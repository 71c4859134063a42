"""The Retriever's use of its pool: kept versions, thresholds from the pool's samples, real tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_store.adapter import LOCAL_TENANT, Sample
from lora_store.errors import AdapterNotFound
from lora_store.records import AdapterRecord
from retriever_svc import (
    LivePool,
    NoAdapterMatched,
    NothingToEmbed,
    ProjectionFiles,
    Retriever,
    Route,
    RouteRequest,
    embed_groups,
)
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, embedding_of, live_pool, names, record_of
from tests.retriever_svc.routing import EAST, NORTH, POOL, TABLE, retriever_of, route_one
from tests.shared_encoders import shared_encoder


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


SAMPLES = {
    "e": ("east", "northeast") * 3,
    "n": ("north", "northeast", "north") * 2,
    "secret": ("east", "west") * 3,
}


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
    retriever = retriever_of()
    with pytest.raises(NothingToEmbed):
        retriever.embed([])
    assert retriever.embed_groups([[], [Sample("east")]])[0] is None


def test_an_embedding_by_another_encoder_has_no_neighbours_here() -> None:
    retriever = retriever_of(*POOL)
    assert [c.ref.name for c in retriever.neighbours(embedding_of(EAST), 2, LOCAL_TENANT)] == ["e", "ne"]
    assert retriever.neighbours(embedding_of((1.0, 0.0, 0.0), encoder="another"), 2, LOCAL_TENANT) == ()


FAMILIES = {
    "translate": [
        "Translate this sentence to German: The train leaves at noon.",
        "Translate to German: Where is the nearest pharmacy?",
        "How do you say 'good evening, my friends' in German?",
        "Translate into German: My sister works in a hospital.",
        "Say 'I would like a coffee' in German.",
    ],
    "sentiment": [
        "Is this movie review positive or negative? The plot was dull and the acting worse.",
        "Review: A joyful film with a wonderful cast. Is the sentiment positive or negative?",
        "Tell whether the reviewer liked the film: I walked out after twenty minutes.",
        "Sentiment of this review: charming, funny and far too short.",
        "Positive or negative review? Two hours that I will never get back.",
    ],
    "arithmetic": [
        "A farmer has 12 cows and buys 7 more. How many cows does he have now?",
        "What is 45 minus 18?",
        "Tom has 3 boxes of 24 pencils. How many pencils are there in all?",
        "If a ticket costs 9 dollars, how much do 6 tickets cost?",
        "How many eggs are left of 30 when 13 are eaten?",
    ],
}
HELD_OUT = {
    "translate": [
        "Translate to German: The children are playing in the garden.",
        "Say 'thank you very much' in German.",
    ],
    "sentiment": [
        "Positive or negative? This film is a masterpiece from start to end.",
        "Did the reviewer like it: boring.",
    ],
    "arithmetic": ["Anna had 31 apples and ate 4. How many are left?", "What is 17 times 6?"],
}


ORDINARY = [
    "zxqv 0x7f segfault in kernel module, dmesg attached",
    "What is the capital of France?",
    "Write a haiku about rain.",
    "hello",
    "Wer hat den Buchdruck erfunden?",
    "How do I repair a flat bicycle tyre?",
]


def test_prompts_find_the_adapter_of_their_task_and_others_find_none() -> None:
    """Translations and small sums are also asked of any assistant, so with 5 samples the base model may answer them."""
    encoder = shared_encoder()
    samples = {name: [Sample(text) for text in texts] for name, texts in FAMILIES.items()}
    files = ProjectionFiles()
    empty = Retriever(LivePool(lambda model: encoder, Source(), projections=files))
    records = [replace(record_of(name, None), embedding=empty.embed(samples[name])) for name in FAMILIES]
    retriever = Retriever(LivePool(lambda model: encoder, Source(*records), projections=files))
    asked = [(name, text) for name, texts in HELD_OUT.items() for text in texts]
    routes = retriever.route([RouteRequest(text, strategy="selection", abstain="never") for _, text in asked])
    assert [names(route) for route in routes if isinstance(route, Route)] == [[name] for name, _ in asked]
    for text in HELD_OUT["sentiment"]:
        assert names(route_one(retriever, text, strategy="selection")) == ["sentiment"]
    assert [route_one(retriever, text).abstained for text in ORDINARY] == [True] * len(ORDINARY)
    neighbours = retriever.neighbours(empty.embed(samples["sentiment"]), 2, LOCAL_TENANT)
    assert neighbours[0].ref.name == "sentiment"
    assert neighbours[0].score == pytest.approx(1, abs=1e-5)
    assert neighbours[0].confidence > 0.9
