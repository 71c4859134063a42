from __future__ import annotations

from typing import Any

import pytest

from deployments.api.pool_responses import point_object
from lora_store import AdapterRef
from retriever_svc import Point
from tests.deployments.adapter_records import digest_of
from tests.deployments.asking import asked, error_of, get, post
from tests.deployments.console_fakes import MappedRetriever


def test_the_map_has_every_adapter_s_place() -> None:
    drawn = get("/v1/pool/map", retriever=MappedRetriever()).json()
    assert (drawn["object"], drawn["generation"], drawn["num_adapters"]) == ("pool_map", 7, 2)
    assert drawn["clusters"] == [{"name": "", "x": 0.0, "y": 0.0, "radius": 1.0, "num_adapters": 2}]
    points = [(point["name"], round(point["x"], 6), point["cluster"]) for point in drawn["points"]]
    assert points == [("poet", 1.0, 0), ("coder", -1.0, 0)]


def test_a_prompt_is_placed_with_the_requested_adapters() -> None:
    body = {"prompt": "a verse", "adapters": ["coder", "nobody"]}
    place = post("/v1/pool/map", body, retriever=MappedRetriever()).json()
    assert place["prompt"] == {"x": 0.0, "y": 0.0}
    assert [point["name"] for point in place["adapters"]] == ["coder"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "adapters": ["x"] * 17}, "adapters"),
        ({"prompt": "a", "adapters": [""]}, "adapters.0"),
        ({"prompt": "a", "min_generation": -1}, "min_generation"),
        ({"prompt": "a", "names": []}, "names"),
    ],
)
def test_a_malformed_request_names_its_field(body: dict[str, Any], param: str) -> None:
    response = post("/v1/pool/map", body, retriever=MappedRetriever())
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_min_generation_reaches_the_retriever() -> None:
    async with asked(retriever=MappedRetriever()) as (client, served):
        await client.get("/v1/pool/map", params={"min_generation": 5})
        await client.post("/v1/pool/map", json={"prompt": "a", "min_generation": 6})
    assert [*served.retriever.called("map"), *served.retriever.called("place")] == [("local", 5), ("local", "a", [], 6)]


def test_another_tenant_s_public_adapter_has_its_full_name() -> None:
    point = Point(AdapterRef("them", "poet", digest_of("x")), 1.0, 2.0)
    assert point_object(point, "us") == {"name": "them/poet", "x": 1.0, "y": 2.0}
    assert point_object(point, "them")["name"] == "poet"
