"""openai (Python)"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Hi"}]


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server_url, api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    """chat"""
    answer = client.chat.completions.create(model="auto", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_chat_stream(client: openai.OpenAI) -> None:
    """streaming with usage"""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="auto", messages=MESSAGES, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-1].usage.completion_tokens == 3


def test_completions(client: openai.OpenAI) -> None:
    """completions"""
    assert client.completions.create(model="poet", prompt="Once").choices[0].text == "Hello"


def test_token_ids_and_echo(client: openai.OpenAI) -> None:
    """prompts as token ids; `echo`"""
    answer = client.completions.create(model="poet", prompt=[79, 110], echo=True)
    assert answer.choices[0].text == "OnHello"


def test_models(client: openai.OpenAI) -> None:
    """models"""
    ids = [model.id for model in client.models.list()]
    assert ids[0] == "auto" and "poet" in ids
    assert client.models.retrieve("poet").id == "poet"


def test_the_adapters_are_in_the_answer_and_in_the_headers(client: openai.OpenAI) -> None:
    """`extra_body` and `with_raw_response` for adapters"""
    body = {"lora": {"adapters": [{"name": "poet"}]}}
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=MESSAGES, extra_body=body)
    assert raw.headers["x-lora-adapters"].startswith("poet@")
    assert raw.parse().lora["adapters"][0]["name"] == "poet"


def test_fields_of_other_servers(client: openai.OpenAI) -> None:
    """fields of other servers are ignored"""
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=MESSAGES, extra_body=body, reasoning_effort="low"
    )
    assert set(raw.headers["x-ignored-fields"].split(", ")) == {"chat_template_kwargs", "reasoning_effort"}


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
ASKED = [{"role": "user", "content": "How is it in 'Rome'?"}]


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    """tools, with `tool_choice`, and their results"""
    answer = client.chat.completions.create(model="auto", messages=ASKED, tools=TOOLS, tool_choice=choice)
    message = answer.choices[0].message
    assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", None)
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain"}
    final = client.chat.completions.create(model="auto", messages=[*ASKED, message, result], tools=TOOLS)
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == ("Hello", "stop")


def test_streamed_tools(client: openai.OpenAI) -> None:
    """streamed tool calls"""
    tool = {"name": "get_weather", "strict": True, "parameters": WEATHER}
    options = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    with client.chat.completions.stream(model="auto", messages=ASKED, **options) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 1 and "".join(piece.arguments_delta for piece in pieces) == '{"city": "Rome"}'
    assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.name == "get_weather"


def test_parsed_tools(client: openai.OpenAI) -> None:
    """`parse` with `pydantic_function_tool`"""
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    answer = client.chat.completions.parse(model="auto", messages=ASKED, tools=[tool])
    [call] = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Rome")


def test_model_names(client: openai.OpenAI, model_name: str) -> None:
    """model names and their policies"""
    assert model_name in [model.id for model in client.models.list()]
    answer: Any = client.chat.completions.create(model=model_name, messages=MESSAGES)
    assert (answer.model, [row["name"] for row in answer.lora["adapters"]]) == (model_name, ["coder"])


def test_errors(client: openai.OpenAI) -> None:
    """errors as exceptions with a code"""
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="auto", prompt="Once", suffix="end")
    assert refused.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError, match="functions") as older:
        client.chat.completions.create(model="auto", messages=MESSAGES, functions=[{"name": "f", "parameters": {}}])
    assert older.value.code == "unsupported"


def test_embeddings(client: openai.OpenAI) -> None:
    """embeddings"""
    answer = client.embeddings.create(model="multilingual-e5-small-tasks", input=["a", "bcd"])
    assert [item.embedding for item in answer.data] == [[1.0, 0.5], [3.0, 0.5]]


def test_structured_chat(client: openai.OpenAI) -> None:
    """`chat.completions.parse`"""
    answer = client.chat.completions.parse(model="auto", messages=MESSAGES, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="text", age=1)


def test_responses(client: openai.OpenAI) -> None:
    """`responses.create`"""
    earlier: Any = client.responses.create(model="auto", input="Hi", instructions="Be brief", metadata={"a": "b"})
    assert (earlier.status, earlier.output_text, earlier.metadata) == ("completed", "Hello", {"a": "b"})
    assert earlier.usage.total_tokens == earlier.usage.input_tokens + 3
    conversation = [{"role": "user", "content": "Hi"}, *earlier.output, {"role": "user", "content": "And now?"}]
    body = {"lora": {"adapters": [{"name": "poet"}]}}
    answer: Any = client.responses.create(model="auto", input=conversation, store=False, extra_body=body)
    assert answer.output_text == "Hello"
    assert answer.lora["adapters"][0]["name"] == "poet"


def test_responses_stream(client: openai.OpenAI) -> None:
    """`responses.stream` and `stream=True`"""
    with client.responses.stream(model="auto", input="Hi") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts == ["Hel", "lo"] and final.output_text == "Hello"
    assert final.usage is not None and final.usage.output_tokens == 3
    events = list(client.responses.create(model="auto", input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


def test_responses_parse(client: openai.OpenAI) -> None:
    """`responses.parse`, whole and as a stream"""
    answer = client.responses.parse(model="auto", input="Hi", text_format=Person)
    assert answer.output_parsed == Person(name="text", age=1)
    with client.responses.stream(model="auto", input="Hi", text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == Person(name="text", age=1)


def test_responses_tools(client: openai.OpenAI) -> None:
    """tools of responses, their results, and streamed calls"""
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}]
    answer = client.responses.create(model="auto", input=ASKED, tools=tools)
    [call] = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Rome"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    final = client.responses.create(model="auto", input=[*ASKED, *answer.output, result], tools=tools)
    assert final.output_text == "Hello"
    with client.responses.stream(model="auto", input=ASKED, tools=tools, tool_choice="required") as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        [streamed] = stream.get_final_response().output
    assert len(pieces) > 1 and "".join(pieces) == streamed.arguments == call.arguments


def test_responses_are_not_stored(client: openai.OpenAI) -> None:
    """stored responses are refused with what to do instead"""
    with pytest.raises(openai.BadRequestError, match="send the whole conversation in input"):
        client.responses.create(model="auto", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="responses are not stored"):
        client.responses.retrieve("resp_1")
