"""LiteLLM"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tests.docs.pages import ROOT, blocks_of

litellm: Any = pytest.importorskip("litellm", reason="litellm is not installed: the extra `clients` has it")
PAGE = ROOT / "docs" / "how-to" / "connect-clients.md"
MESSAGES = [{"role": "user", "content": "Hi"}]


class Person(BaseModel):
    name: str
    age: int


def options(server_url: str, provider: str) -> dict[str, Any]:
    return {"model": f"{provider}/auto", "api_base": server_url, "api_key": "none", "messages": MESSAGES, "timeout": 30}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "lm_studio"])
def test_chat(server_url: str, provider: str) -> None:
    """chat as `openai/auto`, `hosted_vllm/auto` and `lm_studio/auto`"""
    answer = litellm.completion(**options(server_url, provider))
    assert answer.choices[0].message.content == "Hello"


def test_proxy(server_url: str) -> None:
    """the proxy's list of models, through its router: `lora` passes both ways"""
    [block] = [block for block in blocks_of(PAGE) if "of LiteLLM's proxy" in block.text]
    models = yaml.safe_load(block.text.replace("http://127.0.0.1:8000/v1", server_url))["model_list"]
    answer = litellm.Router(model_list=models).completion("auto", MESSAGES, extra_body={"lora": {"explain": True}})
    assert answer.choices[0].message.content == "Hello" and answer.lora["candidates"]


def test_model_names(server_url: str, model_name: str) -> None:
    """model names and their policies"""
    answer = litellm.completion(**options(server_url, "openai") | {"model": f"openai/{model_name}"})
    assert [row["name"] for row in answer.lora["adapters"]] == ["coder"]


def test_stream(server_url: str) -> None:
    """streaming with usage"""
    asked = options(server_url, "openai") | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)] == [3]


def test_fields_that_litellm_passes_on(server_url: str) -> None:
    """`reasoning_effort` and `chat_template_kwargs`"""
    asked = options(server_url, "hosted_vllm") | {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    assert litellm.completion(**asked, reasoning_effort="low").choices[0].message.content == "Hello"


def test_tools(server_url: str) -> None:
    """tools"""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
    asked = options(server_url, "openai") | {"messages": [{"role": "user", "content": "How is it in 'Rome'?"}]}
    [call] = litellm.completion(**asked, tools=tools).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Rome"}')


def test_structured_output(server_url: str) -> None:
    """`response_format` with a model of pydantic"""
    answer = litellm.completion(**options(server_url, "openai"), response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == Person(name="text", age=1)


@pytest.mark.parametrize("model", ["openai/auto", "anthropic/auto"])
def test_a_prompt_that_is_too_long(server_url: str, model: str) -> None:
    """a prompt that is too long is a `ContextWindowExceededError`"""
    url = server_url if model.startswith("openai") else server_url.removesuffix("/v1")
    asked = {"model": model, "api_base": url, "api_key": "none", "max_retries": 0}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked, messages=[{"role": "user", "content": "x" * 200_000}])


def test_other_routes(server_url: str) -> None:
    """`responses`, `text_completion` and `embedding`"""
    asked = options(server_url, "openai")
    del asked["messages"]
    assert litellm.responses(**asked, input="Hi").output[0].content[0].text == "Hello"
    assert litellm.text_completion(**asked, prompt="Once").choices[0].text == "Hello"
    found = litellm.embedding(**asked | {"model": "openai/multilingual-e5-small-tasks"}, input=["a", "bcd"])
    assert [item["embedding"] for item in found.data] == [[1.0, 0.5], [3.0, 0.5]]
