from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deployments.api.completion_responses import plan_object
from deployments.api.pool_responses import lora_object, versions_object
from deployments.api.responses import Planned, Published, published_object
from lora_store import BASE_PLAN
from retriever_svc import Candidate
from retriever_svc.route import NearSample
from tests.deployments.adapter_records import adapter
from tests.deployments.shown_plans import CANDIDATES, PLAN, POET


def test_an_explained_candidate_has_its_nearest_samples() -> None:
    near = replace(CANDIDATES[0], samples=(NearSample("Write a poem.", 0.5), NearSample("Rhyme.", 0.25)))
    first, second = plan_object(Planned(PLAN, (near, CANDIDATES[1])), "local", explain=True)["candidates"]
    assert first["samples"] == [{"input": "Write a poem.", "score": 0.5}, {"input": "Rhyme.", "score": 0.25}]
    assert "samples" not in second


@pytest.mark.parametrize("abstained", [False, True])
def test_a_base_answer_names_the_base_strategy(abstained: bool) -> None:
    shown = plan_object(Planned(BASE_PLAN, abstained=abstained), "local", explain=False)
    assert shown == {"strategy": "base", "adapters": [], "abstained": abstained}


@pytest.mark.parametrize("is_found", [True, False])
def test_an_adapter_is_shown_without_its_embedding(is_found: bool) -> None:
    shown = lora_object(POET if is_found else replace(POET, embedding=None), "local")
    assert (shown["name"], shown["digest"], shown["found_by_auto"]) == ("poet", POET.ref.digest, is_found)
    assert "embedding" not in shown
    json.dumps(shown)


def test_kept_versions_are_distinguished_from_the_live_one() -> None:
    older = adapter("poet", version="older", generation=0, template="chat")
    shown = versions_object([POET, older])
    assert [row["differs"] for row in shown] == [[], ["weights", "tags", "template"]]
    assert (shown[1]["tags"], shown[1]["template"], shown[1]["num_samples"]) == (["older"], "chat", 2)
    bare = replace(POET, samples_digest=None, num_samples=0)
    assert versions_object([POET, bare])[1]["differs"] == ["samples"]
    assert [(row["digest"], row["state"], row["generation"]) for row in shown] == [
        (POET.ref.digest, "live", 1),
        (older.ref.digest, "kept", 0),
    ]


def test_another_tenants_adapter_is_shown_under_its_unambiguous_name() -> None:
    own = adapter("poet", tenant="us").ref
    plan = plan_object(Planned(PLAN, CANDIDATES), "us", explain=True)
    assert [row["name"] for row in (*plan["adapters"], *plan["candidates"])] == [
        "local/poet",
        "local/poet",
        "local/coder",
    ]
    published = published_object(Published(own, 8, 1, 0, True, 0.5, (Candidate(POET.ref, 0.25),)))
    assert (published["name"], published["neighbours"][0]["name"]) == ("poet", "local/poet")
    shown = lora_object(POET, "us")
    assert (shown["id"], shown["name"], shown["tenant"]) == ("local/poet", "poet", "local")
