from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.api.adapters import GcRequest, LoadAdapterRequest, PublishBatch, RollbackRequest, UnloadAdapterRequest
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.api.error_table import validation_error
from deployments.errors import RequestInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import SamplingParams, TokenIds

USER = {"role": "user", "content": "Hi"}
SAMPLING = {
    "max_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 4,
    "min_p": 0.125,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "max_repeats": 5,
    "seed": 11,
    "stop": ("a", "b"),
    "stop_token_ids": (1, 2),
    "ignore_eos": True,
}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [USER], **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "Hi", **fields})


def read_text(request: ChatCompletionRequest | CompletionRequest) -> str | None:
    [question] = request.questions()
    return question.text


def refusal(kind: Any, body: dict[str, Any]) -> RequestInvalid:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return validation_error(caught.value)


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatCompletionRequest, {"messages": [USER], "lora": {"adapter": "x"}}, "lora.adapter"),
        (ChatCompletionRequest, {"messages": [USER], "lora": {"adapters": [{"nam": 1}]}}, "lora.adapters.0.nam"),
        (
            ChatCompletionRequest,
            {"messages": [USER], "lora": {"adapters": [{"name": "a", "scale": 1}]}},
            "lora.adapters.0.scale",
        ),
        (RouteQuery, {"prompt": "Hi", "models": "auto"}, "models"),
        (ChatCompletionRequest, {"messages": [USER], "lora": {"filter": {"tag": "a"}}}, "lora.filter.tag"),
        (PublishBatch, {"adapters": [{"path": "/a", "force": True}]}, "adapters.0.force"),
        (RollbackRequest, {"version": "a"}, "version"),
        (LoadAdapterRequest, {"lora_name": "a", "lora_path": "/a", "pinned": True}, "pinned"),
        (UnloadAdapterRequest, {"name": "a"}, "name"),
        (GcRequest, {"retention": 1}, "retention"),
    ],
)
def test_an_unknown_key_is_refused_by_its_path(kind: Any, body: dict[str, Any], param: str) -> None:
    error = refusal(kind, body)
    assert error.param == param
    assert str(error).startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": {}}, "stop"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_k": 2**70}, "top_k"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop.0"),
        ({"stop": ""}, "stop.0"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"model": "x" * 257}, "model"),
        ({"lora": {"adapters": [{"name": "poet"}] * 17}}, "lora.adapters"),
        ({"lora": {"filter": {"tags": ["x"] * 33}}}, "lora.filter.tags"),
        ({"lora": {"filter": {"tags": ["x" * 65]}}}, "lora.filter.tags.0"),
        ({"lora": {"min_generation": 2**63}}, "lora.min_generation"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"lora": {"min_score": float("nan")}}, "lora.min_score"),
        ({"lora": {"filter": {"tags": [""]}}}, "lora.filter.tags.0"),
        ({"lora": {"min_generation": -1}}, "lora.min_generation"),
        ({"lora": {"adapters": [{"name": "a", "weight": float("nan")}]}}, "lora.adapters.0.weight"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    assert refusal(ChatCompletionRequest, {"messages": [USER], **fields}).param == param


def test_sampling_is_carried_over_field_by_field() -> None:
    bias = {"logit_bias": {"7": -100, "3": 2.5}}
    expected = SAMPLING | {"logit_bias": ((3, 2.5), (7, -100.0)), "logprobs": 4, "prompt_logprobs": 2}
    expected |= {"grammar": None, "unset": frozenset(), "max_tokens_is_default": False}
    assert asdict(chat(**SAMPLING, **bias, logprobs=True, top_logprobs=4, prompt_logprobs=2).sampling()) == expected
    assert asdict(completion(**SAMPLING, **bias, logprobs=4, prompt_logprobs=2).sampling()) == expected
    assert SamplingParams.__dataclass_fields__.keys() == expected.keys()


def test_omitted_sampling_uses_the_engines_defaults_unless_the_base_model_has_some() -> None:
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_repeats"}
    assert chat().sampling() == SamplingParams(unset=frozenset(names))
    assert chat(temperature=1.0, top_k=None).sampling().unset == names - {"temperature"}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, None),
        ({"logprobs": 3}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 3}, 3),
        ({"echo": True, "logprobs": 0, "prompt_logprobs": 2}, 2),
        ({"prompt_logprobs": 0}, 0),
    ],
)
def test_tokens_of_the_prompt_are_scored_for_prompt_logprobs_and_for_echo_with_logprobs(
    fields: dict[str, Any], count: int | None
) -> None:
    assert completion(**fields).sampling().prompt_logprobs == count


def test_no_new_token_goes_with_what_the_prompt_alone_gives() -> None:
    assert completion(echo=True, max_tokens=0).sampling().max_tokens == 0
    assert completion(prompt_logprobs=1, max_tokens=0).sampling().max_tokens == 0
    assert refusal(CompletionRequest, {"prompt": "Hi", "max_tokens": 0}).param == "max_tokens"
    assert refusal(CompletionRequest, {"prompt": "Hi", "prompt_logprobs": 1, "stream": True}).param == "prompt_logprobs"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Oh"], ["Hi", "Oh"]),
        ([1, 2], [TokenIds((1, 2))]),
        ([[1, 2], [3]], [TokenIds((1, 2)), TokenIds((3,))]),
        (["Hi", [3]], ["Hi", TokenIds((3,))]),
    ],
    ids=str,
)
def test_prompts_are_texts_or_token_ids_one_or_several(prompt: Any, expected: list[Any]) -> None:
    assert [question.prompt for question in completion(prompt=prompt).questions()] == expected


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"stop": "END"}, "stop", ("END",)),
        ({"seed": -1}, "seed", None),
        ({"seed": -2}, "seed", 2**63 - 2),
        ({"seed": -(2**63)}, "seed", 0),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"top_k": -1}, "top_k", 0),
        ({"max_completion_tokens": 5}, "max_tokens", 5),
        ({"max_tokens": 9, "max_completion_tokens": 5}, "max_tokens", 5),
    ],
)
def test_other_spellings_of_the_openai_api_are_taken(fields: dict[str, Any], name: str, value: object) -> None:
    """Any seed is taken, and minus one means none; all of top_k are -1; the newer name of max_tokens wins."""
    assert getattr(chat(**fields).sampling(), name) == value


def test_top_p_of_0_leaves_one_id_of_any_vocabulary() -> None:
    assert 0 < chat(top_p=0).sampling().top_p < 1 / 2**19


def test_retrieval_reads_the_last_user_message() -> None:
    turns = [USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Rhyme."}]
    assert read_text(chat(messages=[*turns, {"role": "assistant", "content": "Well,"}])) == "Rhyme."
    assert read_text(chat(messages=[{"role": "system", "content": "Be brief."}])) == "Be brief."
    assert read_text(completion(prompt="Once")) == "Once"


def test_developer_is_system_and_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "Ann"}]
    [question] = chat(messages=turns).questions()
    assert question.prompt == (Message("system", "Be brief."), Message("user", "One two", name="Ann"))


def test_null_counts_as_unset_at_every_level() -> None:
    dumped = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None}
    request = ChatCompletionRequest.model_validate(
        {"messages": [USER, dumped], "temperature": None, "n": None, "stream": None, "lora": {"k": None}}
    )
    assert request == ChatCompletionRequest.model_validate(
        {"messages": [USER, {"role": "assistant", "content": "Hello"}]}
    )
