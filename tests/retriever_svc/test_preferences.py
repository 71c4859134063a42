"""Rankings at routing: beaten adapters give way, and an adapter without samples takes the place of a withdrawn one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from lora_store.adapter import AdapterRef
from lora_store.events import Rank
from lora_store.rankings import OUTCOME, RankedAdapter, Ranking
from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings, Retriever
from retriever_svc.encoder import unit_rows
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FAKE_IDENTITY, FakeEncoder, Source, live_pool, names, record_of, snapshot_of
from tests.retriever_svc.routing import EAST, NORTH, NORTHEAST, TABLE, TEMPERATURE, route_one

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
GOOD, BAD, OTHER = record_of("good", None), record_of("bad", EAST), record_of("other", NORTH)
NEAR, FAR = record_of("near", (0.96, 0.28)), record_of("far", (0.28, 0.96))


def ranking_of(anchor: AdapterRef, *scores: tuple[AdapterRecord, float], encoder: str = FAKE_IDENTITY) -> Ranking:
    """A ranking in which every adapter but the first is beaten."""
    adapters = tuple(RankedAdapter(r.ref, score, 8, place > 0) for place, (r, score) in enumerate(scores))
    return Ranking(anchor, adapters, encoder, np.asarray(EAST, np.float32), np.asarray([0.9, 0.9], np.float32))


def outcome_of(record: AdapterRecord, score: float, prompt: Sequence[float]) -> Ranking:
    return Ranking(
        anchor=AdapterRef("local", f"{OUTCOME}1", ""),
        adapters=(RankedAdapter(record.ref, score, 1, score < 0),),
        encoder=FAKE_IDENTITY,
        vector=np.asarray(prompt, np.float32),
        own_scores=np.empty(0, np.float32),
    )


def retriever_of(
    *records: AdapterRecord,
    ranking: Ranking,
    outcomes: Sequence[Ranking] = (),
    tenant: str = "local",
    approval: bool = False,
) -> Retriever:
    source = Source()
    ranks = tuple(Rank(tenant, item, place == 0, "me", NOON) for place, item in enumerate([ranking, *outcomes]))
    source.now = snapshot_of(*records, rankings={tenant: ranks})
    settings = IndexSettings(requires_approval=approval)
    return Retriever(live_pool(FakeEncoder(TABLE), source, settings=settings), min_score=-1.0, temperature=TEMPERATURE)


def test_a_beaten_adapter_is_replaced_with_its_score_by_the_best_of_its_region() -> None:
    retriever = retriever_of(GOOD, BAD, OTHER, ranking=ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1)))
    route = route_one(retriever)
    assert names(route) == ["good", "other"]
    assert route.candidates[0].score == pytest.approx(1)
    assert names(route_one(retriever, "north"))[0] == "other"
    twice = route_one(retriever_of(NEAR, BAD, OTHER, ranking=ranking_of(BAD.ref, (NEAR, 0.9), (BAD, 0.1))))
    assert names(twice) == ["near", "other"], "one that replaces two is planned once"
    assert twice.candidates[0].score == pytest.approx(1)
    rival = retriever_of(GOOD, BAD, ranking=ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1)), tenant="rival")
    assert [names(route_one(rival)), names(route_one(rival, tenant="rival"))] == [["bad"], ["good"]]
    unlisted = replace(GOOD, expires_at=NOON.replace(year=2100))  # only its name finds it
    ranking = ranking_of(BAD.ref, (unlisted, 0.9), (BAD, 0.1))
    assert names(route_one(retriever_of(unlisted, BAD, OTHER, ranking=ranking))) == ["bad", "other"]


def test_an_evaluation_is_read_by_its_tenant_for_the_version_that_it_measured() -> None:
    ranking = ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1))
    retriever = retriever_of(GOOD, BAD, OTHER, ranking=ranking)
    assert retriever.evaluation("local", "bad") == ranking
    assert retriever.evaluation("local", "good") is None
    assert retriever.evaluation("other", "local/bad") is None
    newer = retriever_of(GOOD, record_of("bad", EAST, version="2"), ranking=ranking)
    assert newer.evaluation("local", "bad") is None


def test_an_adapter_without_samples_is_found_in_the_region_of_a_withdrawn_anchor() -> None:
    ranking = ranking_of(BAD.ref, (GOOD, 0.9))
    assert names(route_one(retriever_of(GOOD, OTHER, ranking=ranking), top_k=1)) == ["good"]
    assert names(route_one(retriever_of(GOOD, OTHER, ranking=ranking), "north", top_k=1)) == ["other"]
    assert names(route_one(retriever_of(GOOD, ranking=ranking))) == ["good"]
    assert route_one(retriever_of(GOOD, OTHER, ranking=ranking), "north").candidates[-1].score == pytest.approx(0)


@pytest.mark.parametrize(
    ("records", "ranking"),
    [
        ((record_of("good", None, version="2"), BAD), ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1))),
        ((GOOD, record_of("bad", EAST, version="2")), ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1))),
        ((BAD,), ranking_of(BAD.ref, (GOOD, 0.9), (BAD, 0.1))),
        ((GOOD, NEAR), ranking_of(BAD.ref, (GOOD, 0.9), encoder="older")),
    ],
    ids=["better one updated", "beaten one updated", "better one withdrawn", "another encoder"],
)
def test_a_ranking_of_other_versions_changes_nothing(records: tuple[AdapterRecord, ...], ranking: Ranking) -> None:
    assert "good" not in names(route_one(retriever_of(*records, ranking=ranking)))


@pytest.mark.parametrize("approval", [False, True])
def test_a_ranking_never_leads_to_an_adapter_that_auto_may_not_choose(approval: bool) -> None:
    private = record_of("good", None, tenant="rival", visibility="private")
    unapproved = record_of("good", None, tenant="rival")
    for better, is_chosen in ((private, False), (unapproved, not approval)):
        ranking = ranking_of(BAD.ref, (better, 0.9), (BAD, 0.1))
        route = route_one(retriever_of(better, BAD, ranking=ranking, approval=approval))
        assert names(route) == (["good"] if is_chosen else ["bad"])


@pytest.mark.parametrize(
    ("praised", "score"),
    [(FAR, 1.0), (OTHER, 0.1), (OTHER, -0.1)],
    ids=["itself", "another one", "another one, blamed"],
)
def test_a_better_adapter_keeps_its_place_beside_an_outcome(praised: AdapterRecord, score: float) -> None:
    """It is found twice: in the place of the beaten one, and itself with a lower score."""
    ranking = ranking_of(BAD.ref, (FAR, 0.9), (BAD, 0.1))
    outcome = outcome_of(praised, score, NORTHEAST)
    for outcomes in ((), (outcome,)):
        best = route_one(retriever_of(BAD, FAR, OTHER, ranking=ranking, outcomes=outcomes)).candidates[0]
        assert (best.ref.name, best.score) == ("far", pytest.approx(1))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_adapter_that_outcomes_exclude_takes_no_place_of_those_that_fit(top_k: int) -> None:
    excluded, fitting = outcome_of(BAD, -1.0, EAST), ["near", "far", "other"]
    retriever = retriever_of(BAD, NEAR, FAR, OTHER, ranking=excluded)
    route = route_one(retriever, top_k=top_k)
    assert names(route) == fitting[:top_k]
    assert [(c.ref.name, c.outcome) for c in route.candidates] == [("bad", -1), *[(name, 0) for name in names(route)]]
    far = route_one(retriever, "north", top_k=top_k)
    assert [candidate.ref.name for candidate in far.candidates] == ["other", "far", "near"][:top_k]


def test_an_excluded_adapter_behind_the_last_that_fits_is_no_candidate() -> None:
    retriever = retriever_of(BAD, NEAR, FAR, ranking=outcome_of(NEAR, -1.0, EAST))
    found = [[c.ref.name for c in route_one(retriever, top_k=top_k).candidates] for top_k in (1, 2)]
    assert found == [["bad"], ["bad", "near", "far"]]


def test_an_outcome_near_another_view_adds_no_adapter_to_this_one() -> None:
    """An adapter that was praised for one paragraph does not answer for another; blame counts for the whole prompt."""
    said = outcome_of(GOOD, 1.0, EAST)
    snapshot = snapshot_of(GOOD, OTHER, rankings={"local": (Rank("local", said, True, "me", NOON),)})
    preferences = Pool.of(snapshot, FakeEncoder(TABLE), IndexSettings()).preferences("local")
    for views, added in (((EAST, NORTH), [GOOD.ref]), ((NORTH, EAST), [])):
        found = preferences.applied(np.asarray(views, np.float32), [], 3, ())
        assert [match.record.ref for match in found] == added


@pytest.mark.parametrize(("has_centre", "reached"), [(True, [True, False]), (False, [True, True])])
def test_an_outcome_reaches_prompts_that_are_near_from_the_centre(has_centre: bool, reached: list[bool]) -> None:
    """All texts of a plain encoder are near each other: the prompts of different tasks have a cosine of 0.9 here."""
    prompts = unit_rows(np.concatenate([np.eye(3), np.full((3, 1), 3.0)], axis=1).astype(np.float32))
    said = outcome_of(GOOD, 1.0, prompts[0])
    snapshot = snapshot_of(GOOD, OTHER, rankings={"local": (Rank("local", said, True, "me", NOON),)})
    centre = prompts.mean(axis=0) if has_centre else None
    preferences = Pool.of(snapshot, FakeEncoder(TABLE), IndexSettings(), centre=centre).preferences("local")
    found = [preferences.applied(prompt[np.newaxis], [], 3, ()) for prompt in prompts[:2]]
    assert [[match.record.ref for match in matches] == [GOOD.ref] for matches in found] == reached
    assert found[0][0].score == pytest.approx(1), "scores are plain cosines, as those of other matches"


def test_a_better_adapter_needs_the_tags_of_the_request() -> None:
    tagged = replace(BAD, tags=("fr",))
    retriever = retriever_of(GOOD, tagged, ranking=ranking_of(BAD.ref, (GOOD, 0.9), (tagged, 0.1)))
    assert names(route_one(retriever, tags=("fr",))) == ["bad"]
    assert names(route_one(retriever)) == ["good"]
