"""Plans that are returned and sent back, other servers' ways to name adapters, and the headers of every answer."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from tests.deployments.adapter_records import BASE, POOL, adapter
from tests.deployments.app_fakes import serve_plainly
from tests.deployments.asking import asked, error_of, post, request
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import BROKEN, FakeWorker

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
POET, CODER = POOL
ROW = {"name": "poet", "digest": POET.ref.digest, "weight": 0.5, "score": None}


def plan_of(*rows: dict[str, Any], strategy: str = "mixture", **fields: Any) -> dict[str, Any]:
    return {"strategy": strategy, "adapters": list(rows), **fields}


def replay(plan: Any, **options: Any) -> httpx.Response:
    return post("/v1/chat/completions", CHAT | {"lora": {"plan": plan}}, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("explain", [False, True])
async def test_the_plan_of_an_answer_can_be_sent_back(stream: bool, explain: bool) -> None:
    served = serve_plainly()
    first = await served.ingress.generate(CHAT | {"lora": {"explain": explain}})
    again = CHAT | {"lora": {"plan": first["lora"]}}
    if stream:
        answer, *_ = [chunk async for chunk in served.ingress.stream(again)]
    else:
        answer = await served.ingress.generate(again)
    for field in ("adapters", "strategy"):
        assert answer["lora"][field] == first["lora"][field]
    (one,), (other,) = served.worker.called("stream")
    planned = [(job.plan.adapters, job.plan.strategy, job.template) for job in (one, other)]
    assert planned[0] == planned[1]
    assert len(served.retriever.called("route")) == 1, "a replay retrieves nothing"


async def test_the_plans_of_route_can_be_sent_back() -> None:
    async with asked() as (client, _):
        plans = (await client.post("/v1/route", json={"prompt": ["a", "b"]})).json()["data"]
        for plan in plans:
            answer = await client.post("/v1/chat/completions", json=CHAT | {"lora": {"plan": plan, "explain": True}})
            reported = answer.json()["lora"]
            kept = {name: value for name, value in plan.items() if name not in ("reason", "why")}
            assert reported == kept | {"candidates": []}, "nothing was chosen again"
            route = await client.post("/v1/route", json={"prompt": "c", "lora": {"plan": plan}})
            assert route.json()["data"] == [reported]


@pytest.mark.parametrize("unread", [["\ud800"], json.loads("[" * 600 + "]" * 600)], ids=["surrogate", "deep"])
def test_candidates_and_contract_of_a_plan_are_not_read(unread: list[Any]) -> None:
    plan = plan_of(ROW, candidates=unread, contract={"instruction": unread})
    content = json.dumps(CHAT | {"lora": {"plan": plan}})  # ASCII, which httpx would not write
    sent = {"content": content, "headers": {"content-type": "application/json"}}
    assert request("POST", "/v1/chat/completions", sent=sent).json()["lora"]["adapters"] == [ROW]


def test_a_plan_can_be_sent_back_whatever_the_length_of_its_why() -> None:
    assert replay(plan_of(ROW, why="x" * 100_000)).json()["lora"]["adapters"] == [ROW]


def test_a_base_plan_and_its_abstention_are_replayed() -> None:
    plan = post("/v1/route", {"prompt": "a"}, retriever=FakeRetriever(abstains=True)).json()["data"][0]
    assert (plan["strategy"], plan["abstained"]) == ("base", True)
    answer = replay(plan)
    assert answer.json()["lora"] == {"strategy": "base", "adapters": [], "abstained": True}
    assert answer.headers["x-lora-generation"] == "7"


@pytest.mark.parametrize(
    "row",
    [ROW | {"digest": adapter("poet", version="gone").ref.digest}, ROW | {"name": "nobody"}, ROW | {"name": "x/poet"}],
    ids=["version", "name", "owner"],
)
def test_a_plan_whose_version_is_gone_is_a_conflict(row: dict[str, Any]) -> None:
    response = replay(plan_of(row))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (409, "plan_gone", "lora.plan")


@pytest.mark.parametrize(
    ("plan", "param"),
    [
        (plan_of(ROW | {"weight": 4.5}), "lora.plan.adapters.0.weight"),
        (plan_of(ROW | {"weight": math.nan}), "lora.plan.adapters.0.weight"),
        (plan_of(ROW | {"weight": -math.inf}), "lora.plan.adapters.0.weight"),
        (plan_of(ROW, strategy="sideways"), "lora.plan.strategy"),
        (plan_of(*[ROW] * 17), "lora.plan.adapters"),
        (plan_of(ROW | {"digest": "d" * 63}), "lora.plan.adapters.0.digest"),
        (plan_of(ROW | {"digest": "D" * 64}), "lora.plan.adapters.0.digest"),
        (plan_of(ROW | {"weights_digest": "d" * 64}), "lora.plan.adapters.0.weights_digest"),
        (plan_of(ROW, generation=-1), "lora.plan.generation"),
        (plan_of(ROW, extra=1), "lora.plan.extra"),
        ("mixture", "lora.plan"),
        (plan_of(ROW, ROW), None),
        (plan_of(ROW, strategy="base"), None),
        (plan_of(strategy="mixture"), None),
        (plan_of(ROW, ROW | {"name": "coder", "digest": CODER.ref.digest}, strategy="selection"), None),
    ],
    ids=str,
)
async def test_a_tampered_plan_is_refused(plan: Any, param: str | None) -> None:
    async with asked() as (client, served):
        body = json.dumps(CHAT | {"lora": {"plan": plan}})  # Python writes NaN and -Infinity, which are not JSON
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/chat/completions", content=body, headers=headers)
        assert (response.status_code, error_of(response)["param"]) == (400, param)
        assert served.worker.called("stream") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("k", 2), ("weights", "uniform"), ("min_score", 0.5), ("fallback", "base"), ("filter", {"tags": ["a"]})],
        *[("query", "other"), ("strategy", "fusion"), ("adapters", [{"name": "poet"}])],
    ],
)
def test_a_plan_excludes_all_other_options(field: str, value: object) -> None:
    response = post("/v1/chat/completions", CHAT | {"lora": {"plan": plan_of(ROW), field: value}})
    assert (response.status_code, error_of(response)["param"]) == (400, f"lora.{field}")


@pytest.mark.parametrize("model", ["poet", BASE])
def test_a_plan_requires_model_auto(model: str) -> None:
    response = post("/v1/chat/completions", CHAT | {"model": model, "lora": {"plan": plan_of(ROW)}})
    assert (response.status_code, error_of(response)["param"]) == (400, "lora.plan")


async def test_a_plan_is_replayed_at_its_generation_and_a_later_one_is_waited_for() -> None:
    async with asked() as (client, served):
        lora = {"plan": plan_of(ROW, generation=5), "min_generation": 6}
        await client.post("/v1/chat/completions", json=CHAT | {"lora": lora})
        [(tenant, strategy, pinned, *generations)] = served.retriever.called("replay")
    assert (tenant, strategy, generations) == ("local", "mixture", [5, 6])
    assert [(row.name, row.digest, row.weight) for row in pinned] == [("poet", POET.ref.digest, 0.5)]


async def test_adapters_are_retrieved_by_another_text_if_given() -> None:
    async with asked() as (client, served):
        await client.post("/v1/chat/completions", json=CHAT | {"lora": {"query": "a rhyme"}})
        await client.post("/v1/route", json={"prompt": ["a", "b"], "lora": {"query": "a rhyme"}})
        assert served.job.prompt[0].content == "Hi"
        texts = [request.text for (requests,) in served.retriever.called("route") for request in requests]
    assert texts == ["a rhyme"] * 3


async def planned(body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
    """Return the plans of the jobs that the worker received."""
    async with asked() as (client, served):
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        return [job.plan for (job,) in served.worker.called("stream")]


@pytest.mark.parametrize("model", [{}, {"model": "auto"}, {"model": BASE}], ids=str)
@pytest.mark.parametrize(
    ("merged", "weights"),
    [
        ({"ids": ["poet", "coder"], "weights": [0.25, -2]}, [0.25, -2.0]),
        ({"ids": ["poet", "coder"], "merge_strategy": "linear", "density": 0, "majority_sign_method": None}, [1, 1]),
        ({"ids": ["poet", "coder"], "weights": []}, [1, 1]),
    ],
    ids=str,
)
async def test_lorax_merged_adapters_are_fusion(
    model: dict[str, str], merged: dict[str, Any], weights: list[float]
) -> None:
    [plan] = await planned(CHAT | model | {"merged_adapters": merged})
    assert plan.strategy == "fusion"
    assert [(row.ref, row.weight) for row in plan.adapters] == [(POET.ref, weights[0]), (CODER.ref, weights[1])]


@pytest.mark.parametrize(
    ("merged", "code", "param"),
    [
        ({"ids": ["poet"], "merge_strategy": "ties"}, "unsupported", "merged_adapters.merge_strategy"),
        ({"ids": ["poet"], "merge_strategy": 3}, "invalid_request", "merged_adapters.merge_strategy"),
        ({"ids": ["poet"], "density": 0.5}, "invalid_request", "merged_adapters.density"),
        ({"ids": ["poet"], "majority_sign_method": "total"}, "invalid_request", "merged_adapters.majority_sign_method"),
        ({"ids": []}, "invalid_request", "merged_adapters.ids"),
        ({"ids": ["poet"], "weights": [1, 1]}, "invalid_request", "merged_adapters.weights"),
        ({"ids": ["poet"], "weights": [5]}, "invalid_request", "merged_adapters.weights.0"),
        ({"ids": ["nobody"]}, "model_not_found", None),
    ],
    ids=str,
)
def test_an_unsupported_merge_is_refused(merged: dict[str, Any], code: str, param: str | None) -> None:
    error = error_of(post("/v1/chat/completions", CHAT | {"merged_adapters": merged}))
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize("model", [{}, {"model": BASE}], ids=str)
async def test_sglangs_lora_path_is_one_adapter_or_one_per_prompt(model: dict[str, str]) -> None:
    [plan] = await planned(CHAT | model | {"lora_path": "poet"})
    assert (plan.strategy, [(row.ref, row.weight) for row in plan.adapters]) == ("selection", [(POET.ref, 1.0)])
    texts = {"prompt": ["a", "b", "c"], **model}
    each = await planned(texts | {"lora_path": ["coder", None, "local/poet"]}, "/v1/completions")
    assert [[row.ref for row in plan.adapters] for plan in each] == [[CODER.ref], [], [POET.ref]]
    same = await planned(texts | {"lora_path": "poet"}, "/v1/completions")
    assert [[row.ref for row in plan.adapters] for plan in same] == [[POET.ref]] * 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_path": "poet", "model": "coder"}, "lora_path"),
        ({"merged_adapters": {"ids": ["poet"]}, "model": "coder"}, "merged_adapters"),
        ({"lora_path": "poet", "merged_adapters": {"ids": ["poet"]}}, "merged_adapters"),
        ({"lora_path": "poet", "lora": {"adapters": [{"name": "coder"}]}}, "lora_path"),
        ({"lora_path": "poet", "lora": {"plan": plan_of(ROW)}}, "lora_path"),
        ({"lora_path": "poet", "lora": {"strategy": "fusion"}}, "lora.strategy"),
        ({"lora_path": "poet", "lora": {"k": 2}}, "lora.k"),
        ({"lora_path": ["poet", "coder"]}, "lora_path"),
        ({"lora_path": []}, "lora_path"),
        ({"lora_path": ""}, "lora_path"),
        ({"lora_path": {"a": 1}}, "lora_path"),
    ],
    ids=str,
)
def test_adapters_are_named_in_one_way(fields: dict[str, Any], param: str) -> None:
    response = post("/v1/chat/completions", CHAT | fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("names", [[], ["poet", "coder"]], ids=str)
def test_one_conversation_takes_one_lora_path(path: str, names: list[str]) -> None:
    conversation = {"input": "Hi"} if path == "/v1/responses" else CHAT
    response = post(path, {**conversation, "max_tokens": 5, "lora_path": names})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_path")


@pytest.mark.parametrize("stream", [False, True])
def test_headers_contain_the_plan_of_every_answer(stream: bool) -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": stream})
    assert [response.headers[f"x-lora-{name}"] for name in ("strategy", "generation")] == ["mixture", "7"]
    assert response.headers["x-lora-adapters"].startswith(f"poet@{POET.ref.digest[:12]};weight=0.5, coder@")
    assert f"chatcmpl-{response.headers['x-request-id']}" in response.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health"])
@pytest.mark.parametrize("given", ["5dba8b27-e6c9", "a" * 65, "two words", ""])
def test_a_plain_id_of_the_client_is_not_added_again(path: str, given: str) -> None:
    """Serve's proxy passes it on and adds it to the response. Added here too, clients would read both as one."""
    method, body = ("POST", {"json": CHAT}) if path.startswith("/v1") else ("GET", {})
    response = request(method, path, sent={"headers": {"x-request-id": given}, **body})
    assert response.status_code == 200
    is_kept = given.startswith("5dba")
    assert ("x-request-id" in response.headers) == (not is_kept)
    if path.startswith("/v1"):
        _, _, reported = response.json()["id"].partition("-")
        assert reported == (given if is_kept else response.headers["x-request-id"])


async def test_every_answer_has_an_id_of_its_own() -> None:
    async with asked(worker=FakeWorker([RuntimeError("secret")])) as (client, _):
        large = {"content": b" " * (5 << 20), "headers": {"content-type": "application/json"}}
        answers = [
            await client.post("/v1/chat/completions", json=CHAT),
            await client.post("/v1/chat/completions", json={}),
            await client.post("/v1/chat/completions", **large),
            *[await client.get(path) for path in ("/v1/models/nobody", "/nowhere", "/health")],
        ]
    assert [answer.status_code for answer in answers] == [500, 400, 413, 404, 404, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_an_answer_of_several_rows_ends_with_the_first_failing_row() -> None:
    assert post("/v1/chat/completions", CHAT | {"n": 3}, worker=FakeWorker(BROKEN)).status_code == 503
