"""llm"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llm", reason="llm is not installed: the extra `clients` has it")
from llm.default_plugins.openai_models import Chat


@pytest.fixture
def model(server_url: str) -> Any:
    return Chat("auto", model_name="auto", api_base=server_url)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_with_system_text(model: Any, stream: bool) -> None:
    """prompts with a system text, whole and as a stream"""
    response = model.prompt("Hi", system="Be brief", key="none", stream=stream)
    assert response.text() == "Hello"
