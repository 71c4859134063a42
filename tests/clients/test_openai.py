"""openai (Python)"""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


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


def test_errors(client: openai.OpenAI) -> None:
    """errors as exceptions with a code"""
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="auto", prompt="Once", suffix="end")
    assert refused.value.code == "unsupported"


def test_embeddings(client: openai.OpenAI) -> None:
    """embeddings"""
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=["a", "bcd"])
    assert [item.embedding for item in answer.data] == [[1.0, 0.5], [3.0, 0.5]]
