"""anthropic (Python)"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

anthropic: Any = pytest.importorskip("anthropic", reason="anthropic is not installed: the extra `clients` has it")
ASKED = [{"role": "user", "content": "How is it in 'Rome'?"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather now.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
OPTIONS: dict[str, Any] = {"model": "auto", "max_tokens": 64}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def client(server_url: str) -> Any:
    return anthropic.Anthropic(base_url=server_url.removesuffix("/v1"), api_key="none", max_retries=0)


def test_messages(client: Any) -> None:
    """messages, with `system` and blocks of text"""
    content = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(**OPTIONS, system="Be kind.", messages=[{"role": "user", "content": content}])
    assert [block.text for block in answer.content] == ["Hello"]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("end_turn", 5, 3)


def test_stream(client: Any) -> None:
    """streaming with usage"""
    with client.messages.stream(**OPTIONS, messages=ASKED) as stream:
        assert "".join(stream.text_stream) == "Hello"
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("end_turn", 5, 3)


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_tools(client: Any, choice: dict[str, Any]) -> None:
    """tools, with `tool_choice`, and their results"""
    answer = client.messages.create(**OPTIONS, messages=ASKED, tools=[TOOL], tool_choice=choice)
    [call] = answer.content
    assert (answer.stop_reason, call.type, call.name, call.input) == (
        "tool_use",
        "tool_use",
        "get_weather",
        {"city": "Rome"},
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain"}]}
    turns = [*ASKED, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**OPTIONS, messages=turns, tools=[TOOL]).content[0].text == "Hello"


def test_streamed_tools(client: Any) -> None:
    """streamed tool calls"""
    with client.messages.stream(**OPTIONS, messages=ASKED, tools=[TOOL], tool_choice={"type": "any"}) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        [call] = stream.get_final_message().content
    assert len(pieces) > 1 and call.input == {"city": "Rome"}


def test_structured_output(client: Any) -> None:
    """`output_config` with a schema"""
    output = {"format": {"type": "json_schema", "schema": Person.model_json_schema()}}
    answer = client.messages.create(**OPTIONS, messages=ASKED, output_config=output)
    assert Person.model_validate_json(answer.content[0].text) == Person(name="text", age=1)


def test_count_tokens(client: Any) -> None:
    """`count_tokens`, with tools"""
    bare = client.messages.count_tokens(model="auto", messages=ASKED).input_tokens
    assert 0 < bare < client.messages.count_tokens(model="auto", messages=ASKED, tools=[TOOL]).input_tokens


def test_errors(client: Any) -> None:
    """errors as exceptions with a type"""
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", max_tokens=9, messages=ASKED)
    assert missing.value.body["error"]["type"] == "not_found_error" and missing.value.request_id
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    with pytest.raises(anthropic.BadRequestError, match="blocks of type 'image'"):
        client.messages.create(**OPTIONS, messages=[{"role": "user", "content": [image]}])


def test_models(client: Any, model_name: str) -> None:
    """the list of models, page by page; a model name and its policy"""
    listed = [model.id for model in client.models.list()]
    assert model_name in listed and [model.id for model in client.models.list(limit=2)] == listed
    assert [model.id for model in client.beta.models.list()] == listed
    answer = client.messages.create(**OPTIONS | {"model": model_name}, messages=ASKED)
    assert [row["name"] for row in answer.lora["adapters"]] == ["coder"]
