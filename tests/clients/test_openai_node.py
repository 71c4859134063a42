"""openai (Node)"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.processes import run_node


@pytest.fixture(scope="module")
def found(server_url: str) -> dict[str, Any]:
    return run_node("openai_node.mjs", server_url)


def test_chat(found: dict[str, Any]) -> None:
    """chat, whole and as a stream with usage"""
    assert found["chat"] == found["chatStream"] == {"text": "Hello", "tokens": 3}


def test_completions(found: dict[str, Any]) -> None:
    """completions"""
    assert found["completions"] == "Hello"


def test_adapters(found: dict[str, Any]) -> None:
    """adapters in the body and in the headers"""
    assert found["adapters"]["name"] == "poet"
    assert found["adapters"]["header"].startswith("poet@")


def test_models(found: dict[str, Any]) -> None:
    """models"""
    assert found["models"][0] == "auto" and "poet" in found["models"]


def test_embeddings(found: dict[str, Any]) -> None:
    """embeddings"""
    assert found["embeddings"] == [[1.0, 0.5], [3.0, 0.5]]


def test_responses(found: dict[str, Any]) -> None:
    """`responses.create` and `responses.stream`"""
    assert found["responses"] == {"text": "Hello", "status": "completed", "tokens": 3}
    assert found["responsesStream"] == {"first": "response.created", "last": "response.completed", "text": "Hello"}


def test_responses_parse(found: dict[str, Any]) -> None:
    """`responses.parse` with a Zod schema"""
    assert found["responsesParse"] == {"name": "text", "age": 1}


def test_tools(found: dict[str, Any]) -> None:
    """tools of chats and responses, and their results"""
    call = ["get_weather", '{"city": "Rome"}']
    assert found["tools"] == {"responses": call, "chat": call, "final": "Hello"}


def test_errors(found: dict[str, Any]) -> None:
    """errors as exceptions with a status"""
    assert found["unknownModel"]["status"] == 404
    assert "nobody" in found["unknownModel"]["error"]
