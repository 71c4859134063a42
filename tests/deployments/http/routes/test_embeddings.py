"""`/v1/embeddings` over HTTP: who may use it, which model it takes, and what it charges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from deployments.auth.authenticator import Work
from tests.deployments.app_fakes import Served
from tests.deployments.asking import ask, error_of, post
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.key_files import bearer, entry, write

MODEL = "multilingual-e5-small-tasks"


def embed(retriever: FakeRetriever | None = None, **fields: Any) -> Any:
    return post("/v1/embeddings", {"model": MODEL, "input": "Hi"} | fields, retriever=retriever)


def test_each_text_has_a_vector_in_order() -> None:
    answer = embed(input=["a", "bcd"]).json()
    assert [item["embedding"] for item in answer["data"]] == [[1.0, 0.5], [3.0, 0.5]]
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert (answer["model"], answer["usage"]) == (MODEL, {"prompt_tokens": 2, "total_tokens": 2})


def test_another_model_is_not_found_the_encoder_is_named_and_nothing_is_charged(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("a", limits={"tokens_per_minute": 10}))
    response = post(
        "/v1/embeddings", {"model": "text-embedding-3-small", "input": "Hello"}, keys_file=keys, headers=bearer("a")
    )
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert MODEL in error_of(response)["message"] and response.headers["x-ratelimit-remaining-tokens"] == "10"


def test_unknown_fields_are_ignored_and_listed_or_refused_in_strict_mode() -> None:
    response = embed(truncate="END")
    assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "truncate")
    strict = post("/v1/embeddings", {"model": MODEL, "input": "Hi", "truncate": "END"}, strict_fields=True)
    assert (strict.status_code, error_of(strict)["param"]) == (400, "truncate")


def test_the_text_that_the_encoder_reads_is_charged(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("a", limits={"tokens_per_minute": 10}))
    body = {"model": MODEL, "input": "word " * 100}
    response = post("/v1/embeddings", body, keys_file=keys, headers=bearer("a"))
    assert (response.status_code, error_of(response)["param"]) == (400, "input")


def test_texts_that_are_embedded_or_counted_are_no_rows_of_a_key(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}

    async def question(client: httpx.AsyncClient, served: Served) -> list[int]:
        authenticator = served.services.authenticator
        with authenticator.running(authenticator.authenticate("Bearer a"), Work()):
            sent = {"embeddings": {"model": MODEL, "input": ["Hi", "you"]}, "messages/count_tokens": chat}
            return [(await client.post(f"/v1/{path}", json=body)).status_code for path, body in sent.items()]

    keys = write(tmp_path / "keys.json", entry("a", limits={"concurrent_requests": 1}))
    assert ask(question, keys_file=keys, headers=bearer("a")) == [200, 200]
