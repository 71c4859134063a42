from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from deployments.api.completions import ChatCompletionRequest, CompletionRequest
from deployments.api.responses import Planned
from deployments.batch.rows import ANSWER, Asked, answered, check_columns, make_bodies, make_request, usage_line
from deployments.errors import BatchRefused, RequestInvalid
from gpu_worker.errors import PromptTooLong
from gpu_worker.front.request.request import Completion, Job
from lora_store import AdapterRef, Plan, PlannedAdapter
from lora_store.usage import SCHEMA, parse_events


def test_a_row_is_the_body_of_a_request() -> None:
    table = pa.table(
        {
            "id": [1, 2],
            "prompt": ["Rhyme", "Count"],
            "model": [None, "poet"],
            "seed": pa.array([7, None], pa.int64()),
            "lora": ['{"k": 2}', None],
            "user": ["not", "asked"],
        }
    )
    first, second = make_bodies(table, {"model": "auto", "max_tokens": 9})
    assert first == {"model": "auto", "max_tokens": 9, "prompt": "Rhyme", "seed": 7, "lora": '{"k": 2}'}
    assert second == {"model": "poet", "max_tokens": 9, "prompt": "Count"}
    request = make_request(first)
    assert isinstance(request, CompletionRequest)
    assert (request.prompt, request.seed, request.max_tokens, request.lora.k) == (["Rhyme"], 7, 9, 2)


@pytest.mark.parametrize("as_json", [False, True])
def test_messages_and_lora_may_be_nested_or_json(as_json: bool) -> None:
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Rhyme"}]
    row: dict[str, Any] = {"messages": messages, "lora": {"k": 2, "strategy": None}}
    if as_json:
        row = {name: json.dumps(value) for name, value in row.items()}
    [body] = make_bodies(pa.Table.from_pylist([row]), {})
    request = make_request(body)
    assert isinstance(request, ChatCompletionRequest)
    [question] = request.questions()
    assert (question.text, question.lora.k, len(question.prompt)) == ("Rhyme", 2, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt.0"),
        ({"prompt": "a", "lora": "{k: 2}"}, "lora"),
        ({"prompt": "a", "lora": '{"strategey": "fusion"}'}, "lora.strategey"),
        ({"messages": "no json"}, "messages"),
        ({"messages": "[" * 100_000}, "messages"),
        ({"prompt": "a", "temperature": 3.0}, "temperature"),
    ],
)
def test_a_row_that_is_not_a_valid_request_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        make_request(body)
    assert caught.value.param == param


def test_an_input_without_prompts_or_with_an_answer_column_is_refused() -> None:
    check_columns(pa.schema([("messages", pa.string()), ("id", pa.int64())]))
    with pytest.raises(BatchRefused, match="neither a column 'prompt' nor 'messages', only question"):
        check_columns(pa.schema([("question", pa.string())]))
    with pytest.raises(BatchRefused, match=r"'error'.*rename"):
        check_columns(pa.schema([("prompt", pa.string()), ("error", pa.string())]))


def test_answers_or_errors_are_added_to_their_rows() -> None:
    ref = AdapterRef("local", "poet", "d" * 64)
    planned = Planned(Plan("selection", (PlannedAdapter(ref, "w" * 64, 1.0, 0.5),)))
    job = Job("row-0", "Rhyme")
    refused = {"message": "no", "type": "t", "param": "lora", "code": "invalid_request"}
    asked = [Asked(planned, job), Asked(error=refused), Asked(planned, job)]
    outcomes = [Completion("text", 3, 2, "stop"), None, PromptTooLong("too long")]
    table = answered(pa.table({"id": [1, 2, 3]}), asked, outcomes)
    assert table.schema.names == ["id", *ANSWER.names]
    first, second, third = table.to_pylist()
    reported = [{"name": "poet", "digest": "d" * 64, "weight": 1.0, "score": 0.5}]
    assert first == {
        "id": 1,
        "text": "text",
        "finish_reason": "stop",
        "adapters": reported,
        "strategy": "selection",
        "num_prompt_tokens": 3,
        "num_new_tokens": 2,
        "error": None,
    }
    assert second["error"] == {"code": "invalid_request", "message": "no", "param": "lora"}
    assert second["text"] is second["adapters"] is None
    assert third["error"] == {"code": "context_length_exceeded", "message": "too long", "param": None}
    assert (third["text"], third["adapters"]) == (None, reported)


@pytest.mark.parametrize("model", [5, ["a"], "m" * 300])
def test_the_usage_of_a_row_with_any_model_can_be_stored(model: Any) -> None:
    began_at = datetime(2026, 11, 30, tzinfo=UTC)
    line = usage_line("run-0", "acme", model, "base", Asked(error={"code": "invalid_request"}), None, began_at)
    table = pa.Table.from_pylist(list(parse_events("run", line)), SCHEMA)
    assert table["model"].to_pylist() == [str(model)[:256]] and table["status"].to_pylist() == [400]
    line = usage_line("run-0", "acme", model, "base", Asked(), Completion("A verse.", 3, 2, "stop"), began_at)
    [event] = parse_events("run", line)
    assert (event["completion_tokens"], event["first_token_s"], event["total_s"]) == (2, None, None)
    assert event["time"] == began_at.timestamp() * 1000
