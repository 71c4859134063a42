"""The shared parts of request bodies: null and unknown keys, bounds, and the options of `lora`.

Fields that are not served are refused by name, fields that ask for nothing are accepted, others are ignored.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from deployments.api.base import (
    HARMLESS,
    MAX_ADAPTERS,
    NOT_SERVED_IN_CHAT,
    NOT_SERVED_IN_COMPLETIONS,
    AdapterChoice,
    ApiRequest,
    LoraOptions,
    MergedAdapters,
    PlanGiven,
    PlanRow,
    at_most,
    ignored_fields,
    options_of_path,
)
from deployments.api.completions import parse
from deployments.errors import RequestInvalid, Unsupported
from retriever_svc import PinnedAdapter
from tests.deployments.asking import error_of, post, request

ROW: dict[str, Any] = {"name": "poet", "digest": "d" * 64, "weight": 0.5}


class Small(ApiRequest):
    """A body of two fields."""

    name: str = "default"
    count: int = 1


def test_a_key_that_is_null_counts_as_unset() -> None:
    assert Small.model_validate({"name": None, "count": 3, "unknown": None}) == Small(count=3)


@pytest.mark.parametrize(
    ("key", "hint"), [("nmae", "did you mean 'name'"), ("zzz", "unknown field"), ("x" * 100_000, "unknown field")]
)
def test_an_unknown_key_is_refused_with_the_near_one(key: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=hint) as caught:
        Small.model_validate({key: 1})
    [error] = caught.value.errors()
    assert (error["type"], error["ctx"]["param"]) == ("unknown_field", key[:200])


@pytest.mark.parametrize("value", [[1, 2], {"a": 1, "b": 2}, "any text", 7])
def test_only_collections_are_counted(value: object) -> None:
    assert at_most(2)(value) is value
    if isinstance(value, list | dict):
        with pytest.raises(PydanticCustomError, match="holds 2 items, at most 1 are allowed"):
            at_most(1)(value)


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (AdapterChoice, {"name": ""}, "name"),
        (AdapterChoice, {"name": "poet", "weight": 4.1}, "weight"),
        (PlanRow, ROW | {"digest": "d" * 12}, "digest"),
        (PlanRow, ROW | {"score": 2.1}, "score"),
        (PlanGiven, {"strategy": "mixture", "adapters": [ROW] * (MAX_ADAPTERS + 1)}, "adapters"),
        (LoraOptions, {"k": MAX_ADAPTERS + 1}, "k"),
        (LoraOptions, {"adapters": []}, "adapters"),
        (LoraOptions, {"min_score": 1.1}, "min_score"),
        (LoraOptions, {"abstain": "sometimes"}, "'never', 'lenient', 'balanced' or 'strict'"),
        (LoraOptions, {"abstain": "never", "min_score": 0.5}, "cannot be combined; set one of them"),
        (LoraOptions, {"filter": {"tags": []}}, "filter"),
        (LoraOptions, {"strategy_options": {"kept_weight": "much"}}, "strategy_options"),
        (LoraOptions, {"strategy_options": dict.fromkeys(map(str, range(17)), "x")}, "holds 17 items, at most 16"),
        (LoraOptions, {"strategy": "base"}, "strategy"),
        (MergedAdapters, {"ids": ["a", "b"], "weights": [1.0]}, "weights has 1 items and ids has 2; they must"),
        (MergedAdapters, {"ids": ["a"], "merge_strategy": "ties"}, "other than 'linear'"),
        (MergedAdapters, {"ids": ["a"], "density": 0.5}, "density"),
    ],
)
def test_a_value_out_of_bounds_is_refused(model: type[BaseModel], body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        model.model_validate(body)


def test_a_row_of_a_plan_pins_its_version_and_a_plan_may_leave_out_its_circumstances() -> None:
    assert PlanRow.model_validate(ROW | {"score": 0.75}).pinned() == PinnedAdapter("poet", "d" * 64, 0.5, 0.75)
    plan = PlanGiven(strategy="mixture", adapters=[PlanRow(**ROW)])
    assert (plan.generation, plan.abstained, plan.candidates, plan.reason) == (0, False, [], None)


def test_options_know_which_of_them_need_retrieval_and_which_name_adapters() -> None:
    retrieved = LoraOptions.model_validate({"k": 2, "query": "bees", "strategy": "fusion"})
    assert (retrieved.of_retrieval, retrieved.names_adapters) == (["k", "query"], None)
    named = LoraOptions.model_validate({"adapters": [{"name": "poet"}]})
    assert (named.of_retrieval, named.names_adapters) == ([], "adapters")
    assert LoraOptions(plan=PlanGiven(strategy="base")).names_adapters == "plan"


@pytest.mark.parametrize(("weights", "expected"), [(None, [1.0, 1.0]), ([0.5, -1.0], [0.5, -1.0])])
def test_merged_adapters_are_a_fusion_of_named_ones(weights: list[float] | None, expected: list[float]) -> None:
    options = MergedAdapters(ids=["a", "b"], weights=weights).options(LoraOptions(explain=True))
    assert (options.strategy, options.explain) == ("fusion", True)
    assert [(choice.name, choice.weight) for choice in options.adapters or []] == list(zip("ab", expected, strict=True))


def test_a_path_is_one_adapter_and_null_is_the_base_model() -> None:
    one = options_of_path("acme/poet", LoraOptions())
    assert (one.strategy, [choice.name for choice in one.adapters or []]) == ("selection", ["acme/poet"])
    base = options_of_path(None, LoraOptions())
    assert base.plan is not None and (base.plan.strategy, base.plan.adapters) == ("base", [])


USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER]}
TEXT = {"prompt": "Once"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ASKED: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "store": True,
    "use_beam_search": True,
    "echo": True,
    "suffix": "end",
    "best_of": 2,
    "include_stop_str_in_output": True,
    "detokenize": False,
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "truncate_prompt_tokens": 5,
    "add_generation_prompt": False,
    "continue_final_message": True,
}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        *((CHAT, name) for name in sorted(NOT_SERVED_IN_CHAT)),
        *((TEXT, name) for name in sorted(NOT_SERVED_IN_COMPLETIONS)),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_name(body: dict[str, Any], name: str) -> None:
    with pytest.raises(Unsupported) as caught:
        parse(body | {name: ASKED.get(name, {"some": "thing"})})
    assert caught.value.param == name


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_an_unsupported_field_is_answered_with_400(path: str, body: dict[str, Any]) -> None:
    response = post(path, body | {"best_of": 2})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported", "best_of")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (body, {name: nothing})
        for body, kind in ((CHAT, NOT_SERVED_IN_CHAT | HARMLESS), (TEXT, NOT_SERVED_IN_COMPLETIONS))
        for name, values in kind.items()
        for nothing in (*values, None)
    ],
    ids=str,
)
def test_a_field_without_effect_is_accepted(body: dict[str, Any], fields: dict[str, Any]) -> None:
    assert parse(body | fields) == parse(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"safety_identifier": "s"},
        {"prompt_cache_key": "k"},
        {"parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"top_logprobs": 0},
    ],
    ids=str,
)
def test_fields_without_effect_on_the_answer_are_accepted(fields: dict[str, Any]) -> None:
    assert ignored_fields(parse(CHAT | fields)) == ()


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
            "messages.0.content.1",
        ),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "messages.0.function_call"),
        ({"role": "assistant", "content": "", "refusal": "no"}, "messages.0.refusal"),
        ({"role": "function", "content": "x", "name": "f"}, "messages.0.role"),
    ],
    ids=str,
)
def test_messages_of_other_kinds_are_refused_by_their_position(message: dict[str, Any], param: str) -> None:
    """They are reported before other problems."""
    for more in ({}, {"temperature": 9}):
        with pytest.raises(Unsupported) as caught:
            parse({"messages": [message, USER], **more})
        assert caught.value.param == param


@pytest.mark.parametrize(("name", "value"), [("best_of", True), ("suffix", 0)])
def test_values_of_different_types_are_not_equal(name: str, value: object) -> None:
    with pytest.raises((RequestInvalid, Unsupported)) as caught:
        parse(TEXT | {name: value})
    assert caught.value.param == name


IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"reasoning_effort": "high", "session_id": "s"}, "reasoning_effort, session_id"),
    ({"temprature": 1}, "temprature"),
    ({"messages": [USER | {"id": "1"}, USER | {"id": "2"}]}, "messages[].id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]}]},
        "messages[].content[].cache_control",
    ),
    ({"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}, "stream_options"),
    ({"\ud800": 1}, "%5Cud800"),
    ({"a\r\nb": 1}, "a%0D%0Ab"),
]


@pytest.mark.parametrize(("fields", "listed"), IGNORED, ids=lambda value: str(value)[:40])
def test_an_unknown_field_is_ignored_and_listed(fields: dict[str, Any], listed: str) -> None:
    content = json.dumps(CHAT | fields).encode()
    headers = {"content-type": "application/json"}
    response = request("POST", "/v1/chat/completions", sent={"content": content, "headers": headers})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"].startswith(listed)


def test_many_unknown_fields_are_listed_in_a_bounded_header() -> None:
    response = post("/v1/completions", TEXT | {f"field{number}" * 50: number for number in range(1000)})
    listed = response.headers["x-ignored-fields"].split(", ")
    assert (response.status_code, len(listed), listed[-1]) == (200, 17, "...")
    assert max(map(len, listed)) <= 64


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"temprature": 1}, "temprature", "; did you mean 'temperature'?"),
        ({"messages": [USER | {"rule": "x"}]}, "messages.0.rule", "; did you mean 'role'?"),
        (
            {"stream_options": {"include_usages": True}, "stream": True},
            "stream_options.include_usages",
            "'include_usage'",
        ),
        ({"zzz": 1}, "zzz", "zzz: unknown field"),
    ],
)
def test_in_strict_mode_an_unknown_field_is_refused_with_the_nearest_name(
    fields: dict[str, Any], param: str, hint: str
) -> None:
    response = post("/v1/chat/completions", CHAT | fields, strict_fields=True)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert hint in error["message"]


def test_strict_mode_accepts_fields_that_ask_for_nothing() -> None:
    fields = {name: values[0] for name, values in HARMLESS.items() if values}
    assert len(fields) > 8
    assert post("/v1/chat/completions", CHAT | fields, strict_fields=True).status_code == 200


@pytest.mark.parametrize("strict", [False, True])
def test_an_unknown_lora_option_is_always_refused_with_the_nearest_name(strict: bool) -> None:
    response = post("/v1/chat/completions", CHAT | {"lora": {"explian": True}}, strict_fields=strict)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "lora.explian")
    assert error["message"] == "lora.explian: unknown field; did you mean 'explain'?"
