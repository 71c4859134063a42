"""Open WebUI, LibreChat, Continue, Cline (request shapes)"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

PART = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
SHAPES: dict[str, dict[str, Any]] = {
    "a chat front end": {
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_id": "c",
        "session_id": "s",
        "id": "m",
        "features": {"web_search": False},
        "messages": [{"role": "user", "content": "Hi", "id": "1"}],
    },
    "a title": {
        "stream": False,
        "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation"},
        "messages": [{"role": "user", "content": "Generate a title"}],
    },
    "an IDE agent": {
        "stream": True,
        "temperature": 0,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning_effort": "medium",
        "messages": [
            {"role": "system", "content": [PART]},
            {"role": "user", "content": [PART]},
            {"role": "assistant", "content": "Hm", "reasoning_content": "think"},
            {"role": "user", "content": "Hi", "opts": {"visible": True}},
        ],
    },
    "a local runner's client": {
        "keep_alive": "5m",
        "options": {"num_ctx": 4096},
        "think": False,
        "messages": [{"role": "user", "content": "Hi"}],
    },
}


@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES.keys())
def test_a_known_shape_is_answered(server_url: str, body: dict[str, Any]) -> None:
    """chats with the fields that these clients are known to send"""
    response = httpx.post(f"{server_url}/chat/completions", json={"model": "auto", **body}, timeout=30)
    assert response.status_code == 200, response.text
    assert "Hel" in response.text
