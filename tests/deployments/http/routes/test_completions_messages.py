"""`/v1/messages`: a chat in the shape of Anthropic's Messages API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpu_worker.config import NativeSettings
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta
from gpu_worker.front.request.tools import ToolCall, ToolCallPiece
from tests.deployments.app_fakes import Served
from tests.deployments.asking import ask, asked, post, request
from tests.deployments.fake_worker import BROKEN, FakeWorker
from tests.deployments.key_files import entry, write

BODY: dict[str, Any] = {"model": "poet", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "look", "input_schema": {"type": "object"}}
CALLS = (
    Delta("Well", 5, 1),
    Delta("", 5, 2, tool_calls=(ToolCallPiece(0, "{", "call_1", "look"),)),
    Delta("", 5, 3, "tool_calls", tool_calls=(ToolCallPiece(0, "}"), ToolCallPiece(1, '{"a": 1}', "call_2", "look"))),
)


def answered(body: dict[str, Any], **options: Any) -> tuple[httpx.Response, Any]:
    """Return the response and the worker's job."""

    async def question(client: httpx.AsyncClient, served: Served) -> Any:
        return await client.post("/v1/messages", json=BODY | body), served.job

    found: tuple[httpx.Response, Any] = ask(question, **options)
    return found


def events_of(body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Return the events of the stream, each of which is named by its type."""
    response = post("/v1/messages", BODY | body | {"stream": True}, **options)
    events = [dict(line.split(": ", 1) for line in text.splitlines()) for text in response.text.strip().split("\n\n")]
    read: list[dict[str, Any]] = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [event["type"] for event in read]
    return read


def test_a_message_has_the_answer_the_usage_and_the_plan() -> None:
    response, job = answered({"system": [{"type": "text", "text": "Be kind."}], "stop_sequences": ["#"], "top_k": 5})
    message = response.json()
    assert message.pop("id").startswith("msg_") and message.pop("lora")["adapters"][0]["name"] == "poet"
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "poet",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "output_tokens": 3,
        },
    }
    assert job.prompt == (Message("system", "Be kind."), Message("user", "Hi"))
    assert (job.sampling.stop, job.sampling.top_k, job.sampling.max_tokens) == (("#",), 5, 9)


@pytest.mark.parametrize("system", ["", [], [{"type": "text", "text": ""}], None], ids=str)
def test_an_empty_system_text_is_no_turn(system: Any) -> None:
    assert answered({"system": system})[1].prompt == (Message("user", "Hi"),)


@pytest.mark.parametrize(
    ("last", "reason", "sequence"),
    [
        (Delta("", 5, 3, "length"), "max_tokens", None),
        (Delta("", 5, 3, "stop", stop="#"), "stop_sequence", "#"),
        (Delta("", 5, 3, "stop", num_cached_tokens=4), "end_turn", None),
        (Delta("", 5, 3, "stop", stop="of a contract"), "end_turn", None),
    ],
    ids=["length", "stop", "end", "another's stop"],
)
def test_the_end_of_an_answer_is_named(last: Delta, reason: str, sequence: str | None) -> None:
    worker = FakeWorker((Delta("x", 5, 2), last))
    message = answered({"stop_sequences": ["#"]}, worker=worker)[0].json()
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == 5
    [*_, delta, _] = events_of({"stop": "#"}, worker=worker)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_whole_calls_before_a_stop_string_are_to_be_run() -> None:
    call = ToolCallPiece(0, "{}", "c", "look")
    worker = FakeWorker((Delta("", 5, 3, "tool_calls", tool_calls=(call,), stop="#"),))
    message = answered({"tools": [TOOL], "stop_sequences": ["#"]}, worker=worker)[0].json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)


@pytest.mark.parametrize("metadata", [{"user_id": None}, {"user_id": "u"}, {}, None])
def test_metadata_may_name_no_user(metadata: dict[str, Any] | None) -> None:
    assert answered({"metadata": metadata})[0].status_code == 200


SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}


@pytest.mark.parametrize("own", [{"structured_outputs": {"regex": "a"}}, {"response_format": {"type": "json_object"}}])
def test_a_format_is_given_once(own: dict[str, Any]) -> None:
    refused = post("/v1/messages", BODY | {"output_config": {"format": SCHEMA}} | own)
    assert (
        refused.status_code == 400 and "output_config.format: the request gives" in refused.json()["error"]["message"]
    )
    grammar = answered({"output_config": {"format": {"type": "text"}}} | own)[1].sampling.grammar
    assert grammar.param == ("response_format" if "response_format" in own else "structured_outputs.regex")


def test_an_error_of_a_schema_names_its_place() -> None:
    large = {"type": "json_schema", "schema": {"enum": ["x" * 70_000]}}
    error = post("/v1/messages", BODY | {"output_config": {"format": large}}).json()["error"]
    assert error["param"] == "output_config.format.schema"


def test_a_stream_has_the_events_of_a_text_in_their_order() -> None:
    start, *events = events_of({})
    assert (start["type"], start["message"]["content"], start["message"]["stop_reason"]) == ("message_start", [], None)
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    assert events == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": answered({})[0].json()["usage"]},
        {"type": "message_stop"},
    ]


def test_calls_are_blocks_of_their_own_in_streams_and_whole_answers() -> None:
    kinds = [(event["type"], event.get("index")) for event in events_of({"tools": [TOOL]}, worker=FakeWorker(CALLS))]
    blocks = [
        [("content_block_start", n), *[("content_block_delta", n)] * num, ("content_block_stop", n)]
        for n, num in enumerate((1, 2, 1))
    ]
    ends = [("message_delta", None), ("message_stop", None)]
    assert kinds == [("message_start", None), *[kind for block in blocks for kind in block], *ends]
    message = answered({"tools": [TOOL]}, worker=FakeWorker(CALLS))[0].json()
    assert message["stop_reason"] == "tool_use" and message["content"] == [
        {"type": "text", "text": "Well"},
        {"type": "tool_use", "id": "call_1", "name": "look", "input": {}},
        {"type": "tool_use", "id": "call_2", "name": "look", "input": {"a": 1}},
    ]


def test_results_become_turns_of_the_tool_before_the_text_beside_them() -> None:
    thought = {"type": "thinking", "thinking": "Hm", "signature": "x"}
    call = {"type": "tool_use", "id": "c", "name": "look", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "Rain"}]}
    turns = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Well"}, call]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}, result, {"type": "text", "text": "Say."}]},
    ]
    _, job = answered({"messages": turns, "tools": [TOOL]})
    assert job.prompt == (
        Message("user", "Look"),
        Message("assistant", "Well", (ToolCall("c", "look", '{"a": 1}'),)),
        Message("tool", "Rain", (), "c", "look"),
        Message("user", "So?\nSay."),
    )


def test_a_result_that_is_an_error_says_so_in_the_prompt() -> None:
    call = {"type": "tool_use", "id": "c", "name": "look"}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "No such city", "is_error": True}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    [_, turn] = answered({"messages": turns, "tools": [TOOL]})[1].prompt
    assert turn == Message("tool", "Error: No such city", (), "c", "look")


ODD = ['{"a": 1e999}', '{"a": "\\ud83d"}', '{"a": ' + "[" * 1200 + "]" * 1200 + "}"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("arguments", ODD, ids=["infinity", "half a pair", "deep"])
def test_odd_arguments_of_a_call_never_fail_a_finished_answer(path: str, stream: bool, arguments: str) -> None:
    worker = FakeWorker((Delta("", 5, 3, "tool_calls", tool_calls=(ToolCallPiece(0, arguments, "c", "look"),)),))
    body = {"model": "poet", "input": "Hi"} if path == "/v1/responses" else BODY
    answer = post(path, body | {"stream": stream}, worker=worker)
    assert answer.status_code == 200 and '"error":{' not in answer.text.replace(" ", ""), answer.text[:500]
    assert json.dumps(arguments)[1:-1] in answer.text or (path == "/v1/messages" and not stream)


def with_input(text: str) -> str:
    """Return a body with a call whose input is this text."""
    call = {"type": "tool_use", "id": "c", "name": "f", "input": "HERE"}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": "So?"}]
    return json.dumps(BODY | {"messages": turns}).replace('"HERE"', text)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_an_input_that_is_nested_too_deeply_is_refused(path: str) -> None:
    async with asked(headers={"content-type": "application/json"}) as (client, _):
        statuses = []
        for depth in [*range(900, 1000, 2), 16_000]:
            answer = await client.post(path, content=with_input('{"a": ' + "[" * depth + "]" * depth + "}"))
            statuses.append(answer.status_code)
            assert answer.status_code == 200 or "nested too deeply" in answer.json()["error"]["message"], depth
    assert {*statuses} == {200, 400}


def test_an_input_with_a_number_that_json_lacks_is_refused_by_its_place() -> None:
    sent = {"content": with_input('{"a": 1e999}'), "headers": {"content-type": "application/json"}}
    answer = request("POST", "/v1/messages", sent=sent)
    assert answer.status_code == 400 and "messages.0.content.0.input: " in answer.json()["error"]["message"]


@pytest.mark.parametrize(("length", "status"), [(128, 200), (129, 400)])
def test_a_tool_may_have_a_name_as_long_as_anthropics(length: int, status: int) -> None:
    assert post("/v1/messages", BODY | {"tools": [TOOL | {"name": "n" * length}]}).status_code == status


@pytest.mark.parametrize(
    ("choice", "required", "only", "parallel"),
    [
        ({"type": "auto"}, False, None, None),
        ({"type": "any", "disable_parallel_tool_use": True}, True, None, False),
        ({"type": "tool", "name": "look"}, True, "look", None),
    ],
    ids=["auto", "any", "tool"],
)
def test_the_choice_of_tools_reaches_the_engine(
    choice: dict[str, Any], required: bool, only: str | None, parallel: bool | None
) -> None:
    tools = answered({"tools": [TOOL], "tool_choice": choice})[1].tools
    assert (tools.required, tools.only, tools.is_parallel) == (required, only, parallel)
    assert answered({"tools": [TOOL], "tool_choice": {"type": "none"}})[1].tools is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "blocks of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "type 'server_tool_use'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages: has no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages.0.content.0.tool_use_id: no message before",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "name: is missing"),
        ({"messages": [*BODY["messages"], {"role": "assistant", "content": "{"}]}, "messages.1: this server does not"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools of type 'web_search_20250305'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "loook"}}, "did you mean 'look'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "is missing; type 'tool' needs it"),
        ({"mcp_servers": [{"url": "https://x"}]}, "mcp_servers"),
        ({"prompt_logprobs": 1}, "prompt_logprobs here yet; use /v1/chat/completions"),
        ({"max_tokens": None}, "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused_by_name_in_anthropics_shape(change: dict[str, Any], words: str) -> None:
    response = post("/v1/messages", BODY | change)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in body["error"]["message"]
    assert body["request_id"] == response.headers["x-request-id"] == response.headers["request-id"]


@pytest.mark.parametrize(
    ("key", "path", "change", "status", "kind"),
    [
        ("good", "/v1/messages", {}, 200, None),
        ("bad", "/v1/messages", {}, 401, "authentication_error"),
        ("good", "/v1/messages", {"model": "nobody"}, 404, "not_found_error"),
        ("good", "/v1/messages/batches", {}, 404, "not_found_error"),
        ("weak", "/v1/messages", {}, 403, "permission_error"),
        ("good", "/v1/messages", {"system": "x" * (4 << 20)}, 413, "request_too_large"),
    ],
)
def test_errors_of_every_layer_have_anthropics_shape_and_its_key_header_is_read(
    tmp_path: Path, key: str, path: str, change: dict[str, Any], status: int, kind: str | None
) -> None:
    keys = write(tmp_path / "keys.json", entry("good", "local"), entry("weak", "local", ["publish"]))
    response = post(path, BODY | change, headers={"x-api-key": key, "anthropic-version": "2023-06-01"}, keys_file=keys)
    assert response.status_code == status, response.text
    assert kind is None or (response.json()["error"]["type"] == kind and response.json()["type"] == "error")


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    *_, before, last = events_of({}, worker=FakeWorker(BROKEN))
    assert before["type"] == "content_block_delta"
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL]}, {"system": "Be kind."}], ids=["bare", "tools", "system"])
def test_tokens_are_counted_as_the_prompt_is_rendered(more: dict[str, Any]) -> None:
    body = {"model": "poet", "messages": BODY["messages"]}
    counted = [post("/v1/messages/count_tokens", body | extra).json()["input_tokens"] for extra in ({}, more)]
    assert counted[0] > 0 and (counted[1] > counted[0]) == bool(more)


def test_a_begun_answer_is_counted_and_an_empty_one_is_none() -> None:
    def turns(text: str) -> dict[str, Any]:
        return {"messages": [*BODY["messages"], {"role": "assistant", "content": text}]}

    counted = [post("/v1/messages/count_tokens", {"model": "poet", **turns(text)}).json() for text in ("", "{")]
    assert counted[1]["input_tokens"] > counted[0]["input_tokens"]
    assert answered(turns(""))[1].prompt == (Message("user", "Hi"),)


def test_tools_that_cannot_fit_the_context_are_not_tokenized() -> None:
    body = BODY | {"tools": [TOOL | {"description": "x" * 100}]}
    answer = post("/v1/messages/count_tokens", body, engine=NativeSettings(max_model_len=10))
    assert answer.json()["error"]["code"] == "context_length_exceeded"
