"""Vercel AI SDK"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.processes import run_node


@pytest.fixture(scope="module")
def found(server_url: str) -> dict[str, Any]:
    return run_node("ai_sdk.mjs", server_url)


def both(result: object) -> dict[str, object]:
    return {"responses": result, "chat": result}


def test_text(found: dict[str, Any]) -> None:
    """`generateText` and `streamText` with `openai('auto')`, which uses responses, and `openai.chat('auto')`"""
    assert found["generateText"] == both({"text": "Hello", "reason": "stop", "tokens": 3})
    assert found["streamText"] == both({"text": "Hello", "reason": "stop"})


def test_objects(found: dict[str, Any]) -> None:
    """`generateObject` and `streamObject`"""
    assert found["generateObject"] == found["streamObject"] == both({"name": "text", "age": 1})


def test_tools(found: dict[str, Any]) -> None:
    """tools, whole and as a stream, with loops of several steps; with responses the provider needs `store: false`"""
    called, city = [[["weather", {"city": "Rome"}]], []], {"city": "Rome"}
    assert found["tools"] == both({"steps": called, "ran": ["Rain in Rome"], "text": "Hello"})
    assert found["streamedTools"] == both({"text": "Hello", "calls": [city]})


def test_conversations(found: dict[str, Any]) -> None:
    """conversations; earlier responses are sent back with the provider's option `store: false`"""
    assert found["conversation"] == both("Hello")
    assert found["continued"] == "Hello"


def test_errors(found: dict[str, Any]) -> None:
    """errors as exceptions with a status"""
    assert found["unknownModel"]["status"] == 404
