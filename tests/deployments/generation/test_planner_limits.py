"""The limits of a request, checked before any work is done for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_worker.config import NativeSettings
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import Served
from tests.deployments.asking import ask, error_of, post
from tests.deployments.key_files import bearer, entry, write


def refused(path: str, body: dict[str, Any], **settings: Any) -> tuple[int, dict[str, Any]]:
    """Return status and error of the response, after checking that neither Retriever nor Worker was called."""

    async def question(client: Any, served: Served) -> Any:
        before = len(served.retriever.calls), len(served.worker.calls)
        response = await client.post(path, json=body)
        assert (len(served.retriever.calls), len(served.worker.calls)) == before
        return response

    response = ask(question, **settings)
    return response.status_code, error_of(response)


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents], **fields}


@pytest.mark.parametrize("model", ["auto", BASE, "poet"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_fit_is_refused_without_any_call(model: str, stream: bool) -> None:
    extra = {"model": model, "stream": stream}
    for path, body in [
        ("/v1/completions", {"prompt": "x" * 641, **extra}),
        ("/v1/chat/completions", chat("x" * 400, "x" * 241, **extra)),
    ]:
        status, error = refused(path, body, engine=NativeSettings(max_model_len=10))
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert error["message"] == (
            "the prompt is too long: this model's maximum context length is 10 tokens, and the prompt has 641"
            " characters; shorten it"
        )


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "max_tokens"),
        ("/v1/chat/completions", "max_completion_tokens"),
        ("/v1/responses", "max_output_tokens"),
        ("/v1/responses", "max_tokens"),
    ],
)
def test_more_new_tokens_than_the_servers_limit_are_refused_by_the_field_that_asks(path: str, field: str) -> None:
    body = {"input": "Hi"} if path == "/v1/responses" else chat("Hi")
    status, error = refused(path, body | {field: 301}, max_new_tokens=300)
    assert (status, error["code"], error["param"]) == (400, "invalid_request", field)
    assert error["message"] == f"{field}: at most 300, got 301"
    assert post(path, body | {field: 300}, max_new_tokens=300).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "/v1/chat/completions",
            {"n": 16, "max_tokens": 781, "ignore_eos": True, "logprobs": True, "top_logprobs": 20},
            "top_logprobs",
        ),
        ("/v1/completions", {"prompt": [[1] * 100] * 128, "max_tokens": 1, "prompt_logprobs": 20}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": [[1] * 100] * 128, "max_tokens": 0, "echo": True, "logprobs": 20}, "logprobs"),
    ],
)
def test_more_log_probabilities_than_an_answer_may_have_are_refused(
    path: str, body: dict[str, Any], field: str
) -> None:
    status, error = refused(path, body if "prompt" in body else chat("Hi", **body))
    assert (status, error["code"], error["param"]) == (400, "invalid_request", field)
    assert "at most 262144 log probabilities" in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_key_allows_are_refused_by_the_field_that_asks(tmp_path: Path, field: str) -> None:
    keys = write(tmp_path / "keys.json", entry("a", "local", limits={"tokens_per_minute": 100}))
    answer = post("/v1/chat/completions", chat("Hi", **{field: 200}), headers=bearer("a"), keys_file=keys)
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)


def test_numbers_of_tokens_messages_and_prompts_have_limits() -> None:
    for field in ("max_tokens", "min_tokens"):
        status, error = refused("/v1/chat/completions", chat("Hi", **{field: 2**70}))
        assert (status, error["type"]) == (400, "invalid_request_error")
    assert refused("/v1/chat/completions", chat(*["x"] * 1025))[0] == 400
    assert refused("/v1/route", {"prompt": ["x"] * 257})[0] == 400
    assert refused("/v1/loras", {"path": "/x", "tags": ["x"] * 33})[0] == 400


def test_tools_and_calls_count_as_a_part_of_the_prompt() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 641}}
    call = {"id": "c", "function": {"name": "f", "arguments": "x" * 641}}
    loop = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    for body in (chat("Hi", tools=[tool]), {"messages": loop}):
        status, error = refused("/v1/chat/completions", body, engine=NativeSettings(max_model_len=10))
        assert (status, error["code"]) == (400, "context_length_exceeded")
