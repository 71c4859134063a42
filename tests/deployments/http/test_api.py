from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from deployments.auth.authenticator import LOCAL_CALLER
from deployments.http.api import list_middleware, send_usage
from deployments.observability.request_context import RequestContext
from deployments.observability.usage import UsageLog
from retriever_svc import NoAdapterMatched
from tests.deployments.adapter_records import adapter
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import error_of, get, post, request
from tests.deployments.fake_retriever import FakeRetriever

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", CHAT | {"model": "nobody"}, 404, "model_not_found", "model"),
        ("/v1/chat/completions", CHAT | {"min_tokens": 2, "max_tokens": 1}, 400, "invalid_request", "min_tokens"),
        ("/v1/route", {"prompt": []}, 400, "invalid_request", "prompt"),
    ],
)
def test_a_refusal_has_the_openai_format(path: str, body: Any, status: int, code: str, param: str) -> None:
    response = post(path, body)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/route"])
def test_a_body_without_its_content_type_is_answered_with_the_header_to_send(path: str) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = request("POST", path, sent={"content": b'{"prompt": "Hi"}', "headers": headers})
    assert response.status_code == 400
    assert "send it with the header Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "x", "model": "\ud800"}',
        rb'{"prompt": "x", "lora": {"adapters": [{"name": "\ud800"}]}}',
        rb'{"prompt": "x", "logit_bias": {"\ud800": 1}}',
    ],
)
def test_half_of_a_surrogate_pair_is_a_bad_request(body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = request("POST", "/v1/completions", sent={"content": body, "headers": headers})
    assert response.status_code in (400, 404)
    assert error_of(response)["message"]


async def test_an_expected_error_is_an_answer_and_does_not_crash_the_replica() -> None:
    served = serve_plainly(retriever=FakeRetriever(failure=NoAdapterMatched(0.1, 0.5)))
    async with http_of(served, raise_app_exceptions=True) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, error_of(response)["code"]) == (422, "no_adapter_matched")
        response = await client.post("/v1/chat/completions", json=CHAT | {"model": "nobody"})
        assert response.status_code == 404


@pytest.mark.parametrize("path", ["/v1/models", "/v1/loras", "/v1/usage?by=key"])
def test_a_long_list_is_written_without_a_walk_over_its_values(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(value: object) -> object:
        raise AssertionError("this takes the event loop several times as long as writing the list")

    monkeypatch.setattr("fastapi.routing.jsonable_encoder", walk)
    listed = get(path, retriever=FakeRetriever([replace(adapter("poet"), source="hf://ré/poet")]))
    assert listed.status_code == 200, listed.text
    assert listed.content == json.dumps(listed.json(), ensure_ascii=False, separators=(",", ":")).encode()


async def test_a_request_passes_the_middleware_in_this_order() -> None:
    """Each needs the results of those before it: the context, and the caller."""
    services = serve_plainly(cors_origins=("https://chat.example",)).services
    order = [type_.cls.__name__ for type_ in list_middleware(services)]
    assert order == ["RequestContextMiddleware", "CORSMiddleware", "Admission", "BodyLimit"]


async def test_a_replica_sends_its_usage_when_it_starts_and_when_it_stops(tmp_path: Path) -> None:
    arrived: list[int] = []

    async def put(segment: str, lines: bytes) -> None:
        arrived.append(lines.count(b"\n"))

    for number in range(2):
        dead = UsageLog(tmp_path, "tiny", put)
        dead.record(RequestContext(f"{number}", "/v1/completions", "POST", caller=LOCAL_CALLER))
        dead.close()
    log = UsageLog(tmp_path, "tiny", put)
    async with asyncio.timeout(60), send_usage(log, FastAPI()):
        while arrived != [1, 1]:
            await asyncio.sleep(0)
        for number in range(3):
            log.record(RequestContext(f"more-{number}", "/v1/completions", "POST", caller=LOCAL_CALLER))
    assert arrived == [1, 1, 3]
