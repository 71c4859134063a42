from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Model

from deployments.config.app import SamplingDefaults
from lora_store import ROUTED_STRATEGIES, AdapterRecord, AdapterRef, NamedPolicy
from lora_store.events import SetName
from lora_store.names import policy_digest
from retriever_svc import WEIGHTINGS
from tests.deployments.adapter_records import BASE, POOL, adapter
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import asked, error_of, get
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.key_files import bearer, keys_of_all_roles
from tests.virtual_time import run_in_virtual_time

MANY = [adapter(f"a{number:03}", version="even" if number % 2 == 0 else "odd") for number in range(25)]


def ids(answer: dict[str, Any]) -> list[str]:
    return [card["id"] for card in answer["data"]]


async def pages(limit: int, after_field: str = "after", **query: Any) -> list[list[str]]:
    """Return the ids of every page, each requested after the previous one."""
    async with asked(retriever=FakeRetriever(MANY)) as (client, _):
        found: list[list[str]] = []
        after, has_more = "", True
        while has_more:
            response = await client.get("/v1/models", params={"limit": limit, after_field: after, **query})
            assert response.status_code == 200, response.text
            answer = response.json()
            found.append(ids(answer))
            assert (answer["first_id"], answer["last_id"]) == (
                (found[-1][0], found[-1][-1]) if found[-1] else (None, None)
            )
            assert len(answer["data"]) == limit or not answer["has_more"]
            has_more, after = answer["has_more"], answer["last_id"]
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 26, 27, 28, 1000])
async def test_pages_contain_every_model_once_and_in_order(limit: int) -> None:
    found = await pages(limit, "after" if limit % 2 else "after_id")
    assert [name for page in found for name in page] == ["auto", BASE, *[record.ref.name for record in MANY]]
    assert len(found) == -(-27 // limit)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"name": "A01"}, [f"a01{digit}" for digit in range(10)]),
        ({"name": "aut"}, ["auto"]),
        ({"tag": "odd"}, [record.ref.name for record in MANY[1::2]]),
        ({"tag": ["odd", "even"]}, []),
        ({"owner": "local"}, [record.ref.name for record in MANY]),
        ({"owner": "nobody"}, []),
    ],
    ids=str,
)
async def test_filters_select_matching_models(query: dict[str, Any], expected: list[str]) -> None:
    assert [name for page in await pages(4, **query) for name in page] == expected


def test_only_the_base_models_card_names_the_base_models_that_adapters_may_have() -> None:
    cards = get("/v1/models", accepts_base=("an/alias",)).json()["data"]
    named = {card["id"]: card["accepts_base"] for card in cards if "accepts_base" in card}
    assert named == {BASE: ["an/alias", f"somewhere/{BASE}", BASE]}


@pytest.mark.parametrize(("role", "is_named"), [("publish", True), ("infer", False), ("admin", False)])
def test_only_keys_that_publish_see_the_accepted_base_models(tmp_path: Path, role: str, is_named: bool) -> None:
    answer = get(f"/v1/models/{BASE}", headers=bearer(role), keys_file=keys_of_all_roles(tmp_path))
    assert ("accepts_base" in answer.json()) == is_named


def test_cards_show_the_settings_sampling_then_the_base_models_own(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    given = SamplingDefaults(temperature=0)
    cases: list[tuple[dict[str, Any], dict[str, float]]] = [
        ({}, {"temperature": 0.6, "top_k": 20}),
        ({"generation_config": "none"}, {}),
        ({"sampling_defaults": given}, {"temperature": 0, "top_k": 20}),
        ({"sampling_defaults": given, "generation_config": "none"}, {"temperature": 0}),
    ]
    for settings, expected in cases:
        answer = get("/v1/models", base_model=str(tmp_path / "base"), **settings).json()
        assert [card["sampling_defaults"] for card in answer["data"]] == [expected] * len(answer["data"])
    assert get("/v1/models/poet", base_model="gemma-3-270m", accepts_base=(BASE,)).json()["sampling_defaults"] == {}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("before_id=poet", "before_id"),
        ("after=a&after_id=b", "after_id"),
    ],
)
def test_a_malformed_query_is_refused_by_its_field(query: str, param: str) -> None:
    response = get(f"/v1/models?{query}")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_unknown_parameters_are_ignored_and_listed_or_refused_in_strict_mode() -> None:
    answer = get("/v1/models?client_version=1&beta=true&limit=2")
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "client_version, beta")
    assert len(answer.json()["data"]) == 2
    strict = get("/v1/models?beta=true", strict_fields=True)
    assert (strict.status_code, error_of(strict)["param"]) == (400, "beta")


def test_the_card_of_auto_lists_the_registered_strategies_and_weightings() -> None:
    cards = {card["id"]: card for card in get("/v1/models").json()["data"]}
    assert get("/v1/models/auto").json() == cards["auto"]
    assert tuple(cards["auto"]["strategies"]) == ROUTED_STRATEGIES
    assert cards["auto"]["strategies"]["selection"] == "the best adapter alone"
    assert cards["auto"]["weights"] == {name: weighting.summary for name, weighting in WEIGHTINGS.items()}
    assert [card for card in cards.values() if "strategies" in card] == [cards["auto"]]


def test_cards_contain_source_and_base_of_a_model() -> None:
    by_id = {card["id"]: Model.model_validate(card).to_dict() for card in get("/v1/models").json()["data"]}
    assert [(card["root"], card["parent"]) for card in by_id.values()] == [
        ("auto", BASE),
        (BASE, None),
        ("coder", BASE),
        ("poet", BASE),
    ]
    assert by_id["poet"]["created"] == int(POOL[0].created_at.timestamp())
    assert by_id["poet"]["owned_by"] == "local"


def test_the_source_of_another_tenants_adapter_is_private() -> None:
    theirs = replace(POOL[0], ref=AdapterRef("other", "theirs", "d" * 64), source="s3://their-bucket/x")
    assert get("/v1/models/other/theirs", retriever=FakeRetriever([theirs])).json()["root"] == "other/theirs"
    assert "their-bucket" not in get("/v1/models", retriever=FakeRetriever([theirs])).text


@pytest.mark.parametrize(
    "name", ["poet", "local/poet", f"{BASE}:poet", f"{BASE}:local/poet", "auto", BASE, f"{BASE}:auto"]
)
async def test_one_model_is_shown_by_any_name_a_request_may_use_and_nothing_is_listed(name: str) -> None:
    async with asked() as (client, served):
        response = await client.get(f"/v1/models/{name}")
        assert served.retriever.called("records") == served.retriever.called("page") == []
    card = response.json()
    assert card["id"] == name
    assert card["parent"] == (None if name == BASE else BASE)


class TwoVersions(FakeRetriever):
    """Has an earlier version of the poet for another template."""

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        return 7, [adapter("poet", template="chat"), adapter("poet", version="older", template="alpaca")]


@pytest.mark.parametrize("prefix", ["", f"{BASE}:"])
def test_a_version_that_is_named_by_its_digest_has_a_card_of_its_own(prefix: str) -> None:
    live, older = adapter("poet").ref.digest, adapter("poet", version="older").ref.digest
    for version, template in (
        ("", "chat"),
        (f"@{live[:8]}", "chat"),
        (f"@{older[:8]}", "alpaca"),
        (f"@{older}", "alpaca"),
    ):
        card = get(f"/v1/models/{prefix}poet{version}", retriever=TwoVersions()).json()
        assert (card["id"], card["template"]) == (f"{prefix}poet{version}", template)


@pytest.mark.parametrize("name", ["", "nobody", "other/poet", f"{BASE}:", f"{BASE}:nobody", "x:poet", "auto:poet"])
def test_an_unknown_model_is_not_found(name: str) -> None:
    response = get(f"/v1/models/{name}")
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("base_model", ["", "a base model that is being removed"])
def test_a_policy_of_a_newer_release_does_not_hide_the_other_models(base_model: str) -> None:
    policy = '{"a_newer_field": 1, "lora": [1]}'
    ref = AdapterRef("local", "newer", policy_digest(policy))
    retriever = FakeRetriever()
    event = SetName(NamedPolicy(ref, policy, "me", datetime.now(UTC), base_model=base_model))
    retriever.model_names.commit(lambda snapshot: [event])
    answer = get("/v1/models", retriever=retriever)
    assert answer.status_code == 200, answer.text
    assert ids(answer.json())[:3] == ["auto", BASE, "newer"]


def test_a_page_continues_after_the_last_one_although_that_adapter_is_gone() -> None:
    held = [adapter(name) for name in "acd"]
    after = get("/v1/models?limit=1&after=b", retriever=FakeRetriever(held)).json()
    assert (ids(after), after["has_more"]) == (["c"], True)


@pytest.mark.parametrize(("settings", "template"), [({}, "auto"), ({"template": "alpaca"}, "alpaca")])
def test_a_card_names_the_template_of_its_chats(settings: dict[str, Any], template: str) -> None:
    cards = {card["id"]: card["template"] for card in get("/v1/models", **settings).json()["data"]}
    assert cards == {"auto": template, BASE: template, "coder": "chat", "poet": template}
    assert get("/v1/models/coder", **settings).json()["template"] == "chat"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/poet", "/v1/loras", "/v1/loras/poet", "/v1/names"])
def test_a_list_without_a_retriever_is_503_in_time(path: str) -> None:
    class Absent(FakeRetriever):
        async def _wait(self, *_: Any) -> Any:
            await asyncio.Event().wait()

        names = page = policies = record = _wait

    async def question() -> httpx.Response:
        async with http_of(serve_plainly(retriever=Absent())) as client:
            return await client.get(path)

    response = run_in_virtual_time(question())
    assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
