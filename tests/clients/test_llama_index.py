"""LlamaIndex"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.processes import run_in_environment

EVERY_WAY = dict.fromkeys(("complete", "stream_complete", "chat", "stream_chat"), "Hello")


@pytest.fixture(scope="module")
def found(server_url: str) -> dict[str, Any]:
    return run_in_environment("llama-index", "llama_index_cases.py", server_url)


def test_default_mode(found: dict[str, Any]) -> None:
    """`OpenAILike` in its default mode, which uses completions without a prompt template"""
    assert found["default"] == EVERY_WAY


def test_chat_model(found: dict[str, Any]) -> None:
    """`OpenAILike` with `is_chat_model=True`"""
    assert found["chat"] == EVERY_WAY
    assert found["adapters"]["candidates"]


def test_responses(found: dict[str, Any]) -> None:
    """`OpenAILikeResponses`"""
    assert found["responses"] == EVERY_WAY
