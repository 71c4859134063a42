"""llm"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llm", reason="llm is not installed: the extra `clients` has it")
from llm.default_plugins.openai_models import Chat


@pytest.fixture
def model(server_url: str) -> Any:
    return Chat("auto", model_name="auto", api_base=server_url, supports_schema=True, supports_tools=True)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_with_system_text(model: Any, stream: bool) -> None:
    """prompts with a system text, whole and as a stream"""
    response = model.prompt("Hi", system="Be brief", key="none", stream=stream)
    assert response.text() == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_schemas(model: Any, stream: bool) -> None:
    """schemas"""
    fields = {"name": {"type": "string"}, "age": {"type": "integer"}}
    schema = {"type": "object", "properties": fields, "required": ["name", "age"]}
    response = model.prompt("Hi", schema=schema, key="none", stream=stream)
    assert json.loads(response.text()) == {"name": "text", "age": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_tools(model: Any, stream: bool) -> None:
    """tools, in a chain that runs them and sends their results"""
    asked: list[str] = []

    def weather(city: str) -> str:
        """Return the weather"""
        asked.append(city)
        return "Rain"

    chain = model.chain("How is it in 'Rome'?", tools=[weather], key="none", stream=stream)
    assert (chain.text(), asked) == ("Hello", ["Rome"])
