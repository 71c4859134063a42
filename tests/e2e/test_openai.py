"""The OpenAI API with the real `openai` client: sync, async and streaming, and its error classes."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.starter_pool import POOL, Heldout

BASE = "gemma-3-270m"
COUNTING = {"model": BASE, "prompt": "One, two, three, four,", "max_tokens": 8, "temperature": 0}
STORY = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "seed": 7}


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_the_first_of_n_choices_equals_a_single_answer(client: openai.OpenAI) -> None:
    alone = client.completions.create(**STORY)
    several = client.completions.create(**STORY, n=3)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts[0] == alone.choices[0].text
    assert len(set(texts)) == 3
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.completion_tokens == 36
    again = client.completions.create(**STORY, n=3)
    assert [choice.text for choice in again.choices] == texts


def test_a_stop_string_is_not_sent(client: openai.OpenAI) -> None:
    asked = {**COUNTING, "max_tokens": 30, "stop": [" seven", "nine"]}
    whole = client.completions.create(**asked, logprobs=0)
    parts = list(client.completions.create(**asked, stream=True))
    text = "".join(part.choices[0].text for part in parts)
    assert text == whole.choices[0].text == "".join(whole.choices[0].logprobs.tokens)
    assert "six" in text and "seven" not in text
    assert whole.choices[0].finish_reason == parts[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs_have_each_token_and_its_alternatives(client: openai.OpenAI) -> None:
    asked = {"model": BASE, "messages": messages("Count: one, two,"), "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert bytes(b for token in choice.logprobs.content for b in token.bytes).decode() == choice.message.content
    for token in choice.logprobs.content:
        best = token.top_logprobs[0]
        assert (token.token, token.logprob) == (best.token, best.logprob), "greedy takes the most likely token"
        assert len(token.top_logprobs) == 3
        assert math.fsum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-5
    streamed = [
        token.logprob
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([token.logprob for token in choice.logprobs.content], abs=1e-4)
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_the_async_client_gets_the_same_answers(url: str, client: openai.OpenAI) -> None:
    async def ask() -> tuple[str, str, int]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as asynchronous:
            whole, stream = await asyncio.gather(
                asynchronous.completions.create(**COUNTING), asynchronous.completions.create(**COUNTING, stream=True)
            )
            parts = [part.choices[0].text async for part in stream]
            models = await asynchronous.models.list()
            return whole.choices[0].text, "".join(parts), len(models.data)

    whole, streamed, num_models = asyncio.run(ask())
    assert whole == streamed == client.completions.create(**COUNTING).choices[0].text
    assert num_models >= 2 + len(list(POOL.glob("*/adapter_config.json")))


def test_a_plan_is_replayed_exactly(url: str, client: openai.OpenAI, heldout: list[Heldout]) -> None:
    prompts = [item.input for item in heldout[:2]]
    plans = httpx.post(f"{url}/v1/route", json={"prompt": prompts}, timeout=60).json()["data"]
    for prompt, plan in zip(prompts, plans, strict=True):
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


def base_text(client: openai.OpenAI, prompt: str) -> str:
    asked = {"messages": messages(prompt), "max_tokens": 12, "temperature": 0}
    text: str = client.chat.completions.create(model=BASE, **asked).choices[0].message.content
    return text


class Order(BaseModel):
    colour: Literal["red", "green"]
    sizes: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(max_length=3)]


def test_a_parsed_answer_follows_its_model(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"messages": messages("Two red shirts"), "max_tokens": 100, "temperature": 1.0}
    for model in ("auto", BASE):
        answer = client.chat.completions.parse(model=model, response_format=Order, n=2, **asked)
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        assert all(isinstance(choice.message.parsed, Order) for choice in answer.choices)


def test_an_adapter_with_a_schema_answers_in_it_without_being_asked(
    client: openai.OpenAI, url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "ordering"
    shutil.copytree(sorted(POOL.glob("*/adapter_config.json"))[0].parent, folder)
    (folder / "description.txt").unlink(missing_ok=True)
    schema = Order.model_json_schema() | {"additionalProperties": False}  # so that an answer must end
    contract = {"instruction": "Order: {input}", "output_schema": schema}
    (folder / "adapter_io.yaml").write_text(json.dumps(contract))
    said = {"path": str(folder), "ttl_s": 600}  # unlisted, so that no other test finds it
    assert httpx.post(f"{url}/v1/loras", json=said, timeout=120).status_code in (201, 202)
    asked: dict[str, Any] = {"model": "ordering", "messages": messages("Two red shirts"), "max_tokens": 100}
    plain = client.chat.completions.create(**asked, extra_body={"lora": {"contract": False}})
    whole = client.chat.completions.create(**asked, temperature=1.0, n=4)
    assert all(Order.model_validate_json(choice.message.content or "") for choice in whole.choices)
    assert whole.usage is not None and plain.usage is not None
    assert whole.usage.prompt_tokens > plain.usage.prompt_tokens, "the instruction counts"
    parts = client.chat.completions.create(**asked, temperature=1.0, stream=True)
    Order.model_validate_json("".join(part.choices[0].delta.content or "" for part in parts if part.choices))
    assert httpx.delete(f"{url}/v1/loras/ordering", timeout=120).status_code == 200


def test_a_required_tool_is_called_with_valid_arguments(client: openai.OpenAI) -> None:
    leave = {"name": "leave", "strict": True, "parameters": {"type": "object", "additionalProperties": False}}
    tools = [openai.pydantic_function_tool(Order, name="order"), {"type": "function", "function": leave}]
    asked: dict[str, Any] = {"messages": messages("Two red shirts"), "tools": tools, "max_tokens": 100}
    for model in ("auto", BASE):
        answer = client.chat.completions.parse(model=model, tool_choice="required", temperature=1.0, n=2, **asked)
        for choice in answer.choices:
            [call] = choice.message.tool_calls or []
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            assert call.function.name == "leave" or isinstance(call.function.parsed_arguments, Order)
    named = {"type": "function", "function": {"name": "order"}}
    with client.chat.completions.stream(model="auto", tool_choice=named, temperature=0, **asked) as stream:
        for _ in stream:
            pass
        [choice] = stream.get_final_completion().choices
    [call] = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Order)
    result = {"role": "tool", "tool_call_id": call.id, "content": "ordered"}
    more = [*asked["messages"], choice.message.model_dump(exclude={"parsed"}, exclude_none=True), result]
    final = client.chat.completions.create(model="auto", **asked | {"messages": more, "max_tokens": 5})
    assert final.usage is not None and final.usage.completion_tokens > 0


def test_errors_have_the_clients_own_classes(client: openai.OpenAI, heldout: list[Heldout]) -> None:
    def ask(**fields: Any) -> None:
        client.chat.completions.create(**{"model": "auto", "messages": messages("hi"), "max_tokens": 2, **fields})

    schema = {"name": "a", "schema": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(openai.BadRequestError, match="at /properties/a cannot be compiled") as invalid:
        ask(response_format={"type": "json_schema", "json_schema": schema})
    assert (invalid.value.code, invalid.value.param) == ("invalid_request", "response_format.json_schema.schema")
    with pytest.raises(openai.BadRequestError, match="use tools") as functions:
        ask(functions=[{"name": "f", "parameters": {}}])
    assert (functions.value.code, functions.value.param) == ("unsupported", "functions")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema["schema"]}}
    with pytest.raises(openai.BadRequestError, match="at /0/function/parameters/properties/a") as uncompiled:
        ask(tools=[tool], tool_choice="required")
    assert (uncompiled.value.code, uncompiled.value.param) == ("invalid_request", "tools")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            ask(messages=messages("word " * 4000), stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(extra_body={"lora": {"strategey": "mixture"}})
    assert unknown.value.param == "lora.strategey"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="nobody/nothing")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    gone = {"strategy": "selection", "adapters": [{"name": heldout[0].task, "digest": "0" * 64, "weight": 1.0}]}
    with pytest.raises(openai.ConflictError) as conflict:
        ask(extra_body={"lora": {"plan": gone}})
    assert conflict.value.code == "plan_gone"
    with pytest.raises(openai.UnprocessableEntityError) as unmatched:
        ask(extra_body={"lora": {"min_score": 1.0, "fallback": "error"}})
    assert unmatched.value.code == "no_adapter_matched"
