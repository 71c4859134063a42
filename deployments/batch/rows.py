"""Convert the rows of an offline run to requests of the HTTP API, and their outcomes to rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from deployments.api import error_table
from deployments.api.completion_responses import plan_object
from deployments.api.completions import TextRequest, parse
from deployments.api.responses import Planned
from deployments.auth.authenticator import Caller
from deployments.errors import BatchRefused, RequestInvalid
from deployments.json_types import JsonMapping, JsonObject
from deployments.observability.request_context import RequestContext
from deployments.observability.usage import encode_event
from gpu_worker.front.request.request import Completion, Delta, Job

_PROMPTS = ("prompt", "messages")
_JSON = ("messages", "lora")
_REFUSED = 400
_MAX_NAME_CHARS = 256
FIELDS = ("model", "max_tokens", "temperature", "seed", "lora")  # besides the prompt, as in a request's body
_ADAPTER = pa.struct(
    [("name", pa.string()), ("digest", pa.string()), ("weight", pa.float64()), ("score", pa.float64())]
)
_ERROR = pa.struct([("code", pa.string()), ("message", pa.string()), ("param", pa.string())])
_OF_COMPLETION = ("text", "finish_reason", "num_prompt_tokens", "num_new_tokens")
ANSWER = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("adapters", pa.list_(_ADAPTER)),
        pa.field("strategy", pa.string()),
        pa.field("num_prompt_tokens", pa.int64()),
        pa.field("num_new_tokens", pa.int64()),
        pa.field("error", _ERROR),
    ]
)
ANSWER_OF_SEVERAL = ANSWER.append(pa.field("base_model", pa.string()))
"""The columns of an answer where several base models are served."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A planned row: the engine's job, or the error."""

    planned: Planned | None = None
    job: Job | None = None
    error: JsonObject | None = None


def check_columns(schema: pa.Schema, answer: pa.Schema = ANSWER) -> None:
    """Check that there is a prompt column, and no column with the name of an answer column. Raises: BatchRefused."""
    if not any(name in schema.names for name in _PROMPTS):
        raise BatchRefused(f"the input has neither a column 'prompt' nor 'messages', only {', '.join(schema.names)}")
    for name in answer.names:
        if name in schema.names:
            raise BatchRefused(f"the input has a column {name!r}, which is the name of an answer column: rename it")


def make_bodies(table: pa.Table, defaults: JsonMapping) -> list[JsonObject]:
    """Return each row as the body of a request. Null fields use `defaults`, then the server's defaults."""
    asking = table.select([name for name in table.column_names if name in (*_PROMPTS, *FIELDS)])
    return [
        {**defaults, **{name: value for name, value in row.items() if value is not None}} for row in asking.to_pylist()
    ]


def make_request(body: JsonMapping) -> TextRequest:
    """Return the row's request. Raises: RequestInvalid, Unsupported."""
    if sum(name in body for name in _PROMPTS) != 1:
        raise RequestInvalid("a row needs either a prompt or messages", "prompt")
    if not isinstance(body.get("prompt", ""), str):
        raise RequestInvalid("prompt: must be one text", "prompt")
    return parse({name: _decoded(name, value) if name in _JSON else value for name, value in body.items()})


def _decoded(name: str, value: object) -> Any:
    """Return a struct or list unchanged, and a text parsed as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as exc:
        raise RequestInvalid(f"{name}: invalid JSON: {exc}", name) from exc


def answered(
    table: pa.Table,
    asked: Sequence[Asked],
    outcomes: Sequence[Completion | Exception | None],
    answer: pa.Schema = ANSWER,
) -> pa.Table:
    """Return the input's columns and those of the answers. `outcomes`: the engine's; None for rows without a job."""
    rows = [make_columns(*each) for each in zip(asked, outcomes, strict=True)]
    columns = pa.Table.from_pylist(rows, answer)
    for name in answer.names:
        table = table.append_column(answer.field(name), columns[name])
    return table


def make_columns(asked: Asked, outcome: Completion | Exception | None) -> JsonObject:
    """Return the columns of one answer that have a value."""
    line: JsonObject = {"error": asked.error}
    if asked.planned is not None and asked.job is not None:
        plan = plan_object(asked.planned, asked.job.tenant, explain=False)
        line |= {"adapters": plan["adapters"], "strategy": plan["strategy"], "base_model": plan.get("base_model")}
    if isinstance(outcome, Exception):
        line["error"] = error_table.describe(outcome)[1]["error"]
    elif outcome is not None:
        line |= {field: getattr(outcome, field) for field in _OF_COMPLETION}
    return line


def usage_line(
    name: str,
    tenant: str,
    model: object,
    base: str,
    asked: Asked,
    outcome: Completion | Exception | None,
    ended_at: datetime,
) -> bytes:
    """Return the row's usage event, without a duration. The status of a row that was not planned is 400.

    `model`: the row's value, which may be of any type and length in a row that was refused. `base`: the base model of a
    row whose plan names none.
    """
    shown = str(model)[:_MAX_NAME_CHARS]
    context = RequestContext(name, "batch", caller=Caller(tenant, frozenset(), "batch"), model=shown)
    context.code = "" if asked.error is None else asked.error["code"]
    status = _REFUSED if asked.error else 200
    if asked.planned is not None:
        context.record_plans([asked.planned], 0)
    if isinstance(outcome, Exception):
        status, body = error_table.describe(outcome)
        context.code = body["error"]["code"]
    elif outcome is not None:
        counts = (outcome.num_prompt_tokens, outcome.num_new_tokens)
        context.record_delta(0, Delta("", *counts, num_cached_tokens=outcome.num_cached_tokens))
    return encode_event(context, context.base_model or base, status, ended_at=ended_at)
