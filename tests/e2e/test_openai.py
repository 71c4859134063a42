"""The OpenAI API over HTTP and a real model: plans sent back, a parsed answer, and the client's error classes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.starter_pool import Heldout

BASE = "gemma-3-270m"


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_a_plan_is_replayed_exactly(url: str, client: openai.OpenAI, heldout: list[Heldout]) -> None:
    prompts = [item.input for item in heldout[:2]]
    plans = httpx.post(f"{url}/v1/route", json={"prompt": prompts}, timeout=60).json()["data"]

    def check(prompt: str, plan: dict[str, Any]) -> None:
        asked = {"model": "auto", "messages": messages(prompt), "max_tokens": 12, "temperature": 0}
        first = client.chat.completions.with_raw_response.create(**asked)
        again = client.chat.completions.with_raw_response.create(**asked, extra_body={"lora": {"plan": plan}})
        assert first.parse().choices[0].message.content == again.parse().choices[0].message.content
        assert first.parse().model_extra["lora"] == again.parse().model_extra["lora"]
        for header in ("x-lora-strategy", "x-lora-adapters", "x-lora-generation"):
            assert first.headers[header] == again.headers[header]
        assert first.headers["x-request-id"] != again.headers["x-request-id"]
        assert first.parse().id == f"chatcmpl-{first.headers['x-request-id']}", "the proxy's id, and once"
        other = {"plan": plan | {"adapters": [row | {"weight": 0.0} for row in plan["adapters"]]}}
        silent = client.chat.completions.create(**asked, extra_body={"lora": other})
        assert silent.choices[0].message.content == base_text(client, prompt), "weights are used as given"

    with ThreadPoolExecutor(len(prompts)) as threads:  # the engine computes both in the time of one
        list(threads.map(check, prompts, plans))


def base_text(client: openai.OpenAI, prompt: str) -> str:
    asked = {"messages": messages(prompt), "max_tokens": 12, "temperature": 0}
    text: str = client.chat.completions.create(model=BASE, **asked).choices[0].message.content
    return text


class Order(BaseModel):
    colour: Literal["red", "green"]
    sizes: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(max_length=3)]


def test_a_parsed_answer_follows_its_model(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": messages("Two red shirts"), "max_tokens": 100, "temperature": 1.0}

    def check(model: str) -> None:
        answer = client.chat.completions.parse(model=model, response_format=Order, n=2, **asked)
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        assert all(isinstance(choice.message.parsed, Order) for choice in answer.choices)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(check, ("auto", BASE)))


def test_errors_have_the_clients_own_classes(client: openai.OpenAI, heldout: list[Heldout]) -> None:
    def ask(**fields: Any) -> None:
        client.chat.completions.create(**{"model": "auto", "messages": messages("hi"), "max_tokens": 2, **fields})

    schema = {"name": "a", "schema": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(openai.BadRequestError, match="at /properties/a cannot be compiled") as invalid:
        ask(response_format={"type": "json_schema", "json_schema": schema})
    assert (invalid.value.code, invalid.value.param) == ("invalid_request", "response_format.json_schema.schema")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema["schema"]}}
    with pytest.raises(openai.BadRequestError, match="at /0/function/parameters/properties/a") as uncompiled:
        ask(tools=[tool], tool_choice="required")
    assert (uncompiled.value.code, uncompiled.value.param) == ("invalid_request", "tools")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            ask(messages=messages("word " * 4000), stream=stream)
        assert long.value.code == "context_length_exceeded"
    gone = {"strategy": "selection", "adapters": [{"name": heldout[0].task, "digest": "0" * 64, "weight": 1.0}]}
    with pytest.raises(openai.ConflictError) as conflict:
        ask(extra_body={"lora": {"plan": gone}})
    assert conflict.value.code == "plan_gone"
    with pytest.raises(openai.UnprocessableEntityError) as unmatched:
        ask(extra_body={"lora": {"min_score": 1.0, "fallback": "error"}})
    assert unmatched.value.code == "no_adapter_matched"
