"""The plans of a part, row by row, and the calls of the encoder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.batch.planning import BatchRouting, PartPlanner, ask_planner
from deployments.config.app import AppConfig
from deployments.generation.planner import Planner
from lora_store import AdapterRef, Plan, PlannedAdapter, Trial, TrialVersion
from retriever_svc import NoAdapterMatched, Retriever, Route, RouteRequest
from tests.deployments.batching import BASE, TOPICS, Place, prompts


async def test_every_row_of_a_part_has_a_job_of_its_own_or_an_error(place: Place) -> None:
    rows = prompts(8)
    rows[6] = rows[6] | {"model": "nobody", "lora": None}
    run = place.begin(rows, part_rows=5, tenant="acme")
    planner = PartPlanner(run)
    first, second = [await planner.plan(part) for part in run.parts]
    jobs = [(asked.job.request_id, asked.job.tenant) for asked in first.asked if asked.job is not None]
    assert jobs == [(f"{run.id}-row-{n}", "acme") for n in range(5)]
    assert [asked.job is None for asked in second.asked] == [False, True, False]
    assert [row["prompt"] for row in second.rows.to_pylist()] == [row["prompt"] for row in rows[5:]]
    error = second.asked[1].error
    assert error is not None and (error["code"], "nobody" in error["message"]) == ("model_not_found", True)
    assert {asked.job.sampling.max_tokens for asked in first.asked if asked.job is not None} == {6}, "the run's default"


@pytest.mark.parametrize("is_strict", [False, True])
async def test_a_row_with_an_unknown_field_is_refused_where_the_settings_are_strict(
    is_strict: bool, place: Place
) -> None:
    messages = [{"role": "user", "content": "Explain the sea", "cache_contrl": {}}]
    config = place.config.model_copy(update={"strict_fields": is_strict})
    run = place.begin([{"messages": json.dumps(messages)}], config=config)
    [asked] = (await PartPlanner(run).plan(run.parts[0])).asked
    assert (asked.job is None) == is_strict
    assert (asked.error and asked.error["param"]) == ("messages.0.cache_contrl" if is_strict else None)


async def test_a_run_of_another_base_uses_no_adapter_and_names_it_where_a_row_does(place: Place) -> None:
    other = AppConfig.model_validate(place.config.model_dump() | {"base_model_name": "another-base"})
    run = place.begin([{"prompt": "The sea", "model": "auto"}, {"prompt": "The sea", "model": "the-sea"}], config=other)
    found, named = (await PartPlanner(run).plan(run.parts[0])).asked
    assert (run.num_adapters, run.unserved) == (0, ((BASE, 5),))
    assert found.job is not None and found.job.plan.strategy == "base"
    assert named.error is not None and named.error["code"] == "adapter_incompatible"
    assert f"base model '{BASE}', and this server serves 'another-base'" in named.error["message"]


async def test_a_row_has_the_template_of_the_base_model_that_answers(two_bases: AppConfig, tmp_path: Path) -> None:
    first, second = two_bases.models
    models = (first, second.model_copy(update={"template": "chat"}))
    config = AppConfig(models=models, store_uri=two_bases.store_uri, retrieval=two_bases.retrieval)
    rows = [{"messages": json.dumps([{"role": "user", "content": f"Explain {topic}."}])} for topic in TOPICS[::2]]
    run = Place(tmp_path, config).begin(rows)
    asked = (await PartPlanner(run).plan(run.parts[0])).asked
    found = [(item.job.plan.base_model, item.job.template) for item in asked if item.job is not None]
    assert found == [("first", "auto"), ("second", "chat"), ("second", "chat")]


def make_planner(place: Place, plan: Plan) -> Planner:
    """Return a planner that finds this plan for every named model."""

    class Found(BatchRouting):
        async def find_model(self, *args: object, **options: object) -> Plan:
            return plan

    return Planner(place.config.served_models, place.config.retrieval, Found(Retriever.__new__(Retriever)))


LIVE, TRIED = (AdapterRef("local", "sea", letter * 64) for letter in "dt")
SEA = (PlannedAdapter(LIVE, "w", 1.0),)


async def test_a_row_is_asked_by_the_contract_of_its_adapter(place: Place) -> None:
    planner = make_planner(place, Plan("selection", SEA, contract='{"instruction":"Sing: {input}"}'))
    for lora, content in (({}, "Sing: Hi"), ({"contract": False}, "Hi")):
        body = {"prompt": "Hi", "model": "sea", "lora": lora}
        asked = await ask_planner(planner, place.config, "local", "row-0", body)
        assert asked.job is not None and asked.job.prompt == content


async def test_a_row_is_answered_by_a_version_under_trial_as_a_request_with_its_id_is(place: Place) -> None:
    trial = Trial(TRIED.digest, 0.5)
    planner = make_planner(place, Plan("selection", SEA, trials=(TrialVersion(LIVE, TRIED, "v", trial),)))
    names = [f"run-row-{number}" for number in range(16)]
    for name in names:
        body = {"prompt": "Hi", "model": "sea"}
        asked = await ask_planner(planner, place.config, "local", name, body)
        assert asked.job is not None
        assert asked.job.plan.adapters[0].ref == (TRIED if trial.includes(f"{name}/0") else LIVE)
    assert {trial.includes(f"{name}/0") for name in names} == {True, False}


class Counting:
    """A Retriever that notes the texts of each call. No adapter fits the text "odd"."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def route(self, requests: list[RouteRequest]) -> list[Any]:
        self.calls.append([request.text for request in requests])
        return [
            NoAdapterMatched(0.1, 0.5)
            if r.text == "odd"
            else Route(Plan("base", (), number), (), number, abstained=True)
            for number, r in enumerate(requests)
        ]


async def test_prompts_of_one_part_share_a_call_of_the_encoder() -> None:
    counting = Counting()
    retriever = BatchRouting(counting)  # type: ignore[arg-type]
    asked = [retriever.route([RouteRequest(text)]) for text in ("one", "odd", "two")]
    together = await asyncio.gather(*asked, return_exceptions=True)
    one, odd, two, later = [*together, await retriever.route([RouteRequest("later"), RouteRequest("last")])]
    assert counting.calls == [["one", "odd", "two"], ["later", "last"]]
    assert [[route.generation for route in routes] for routes in (one, two, later)] == [[0], [2], [0, 1]]
    assert isinstance(odd, NoAdapterMatched)


@pytest.mark.parametrize("staying", [[], ["two"]])
async def test_prompts_of_callers_that_left_are_not_encoded(staying: list[str]) -> None:
    counting = Counting()
    retriever = BatchRouting(counting)  # type: ignore[arg-type]
    asked = [asyncio.create_task(retriever.route([RouteRequest(text)])) for text in ("one", *staying, "three")]
    await asyncio.sleep(0)
    asked[0].cancel()
    asked[-1].cancel()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(item, asyncio.CancelledError) for item in found] == [True, *[False] * len(staying), True]
    assert counting.calls == ([staying] if staying else [])
