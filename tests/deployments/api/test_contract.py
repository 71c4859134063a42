from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deployments.api.anthropic_request import MessagesRequest
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, GenerationRequest
from deployments.api.contract import AppliedContract, Contract, applied_contract
from deployments.api.responses_request import ResponsesRequest
from deployments.errors import RequestInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import TokenIds
from lora_store import Plan, PlannedAdapter
from tests.deployments.adapter_records import POOL

SCHEMA = {"type": "object", "properties": {"z": {}, "a": {}}}
WHOLE: dict[str, Any] = {
    "instruction": "Say {input} {{twice}}.",
    "output_schema": SCHEMA,
    "stop": ["END"],
    "sampling": {"temperature": 0.25, "top_k": -1, "top_p": 0, "max_tokens": 900},
}
ALL = ["instruction", "output_schema", "stop", "temperature", "top_p", "top_k", "max_tokens"]
TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]
ROWS = tuple(PlannedAdapter(record.ref, record.weights_digest, 0.0) for record in POOL)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": TURNS, **fields})


def applied(request: GenerationRequest, contract: dict[str, Any] = WHOLE) -> AppliedContract | None:
    plan = Plan("selection", (replace(ROWS[0], weight=0.3),), contract=json.dumps(contract))
    [question] = request.questions()
    return applied_contract(plan, question, request.sampling(), request.set_fields)


def test_a_contract_sets_what_the_request_does_not() -> None:
    request = chat(instruction="ignored", output_schema={})  # fields that the server ignores
    found = applied(request)
    assert found is not None and list(found.parts) == ALL
    sampling = found.sampling(request.sampling())
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.25, 0, 1e-6, 900)
    assert sampling.max_tokens_is_default and not request.sampling().max_tokens_is_default
    assert sampling.stop == ("END",) and sampling.grammar is not None
    assert list(json.loads(sampling.grammar.text)["properties"]) == ["z", "a"], "the answer has this order"
    assert sampling.with_defaults({"temperature": 1.5, "min_p": 0.1}).temperature == 0.25
    assert sampling.with_defaults({"min_p": 0.1}).min_p == 0.1


def test_the_instruction_goes_around_the_users_last_message_only() -> None:
    found = applied(chat(messages=[*TURNS, {"role": "assistant", "content": "{input}"}]))
    assert found is not None
    turns = found.prompt((Message("user", "one"), Message("user", "{input} two"), Message("assistant", "x")))
    assert [turn.content for turn in turns if isinstance(turn, Message)] == ["one", "Say {input} two {{twice}}.", "x"]
    assert found.prompt("a text") == "Say a text {{twice}}."


def test_an_instruction_may_be_a_message_after_the_conversation() -> None:
    contract = {"instruction": "Rewrite: {input}", "as_message": True}
    found = applied(chat(), contract)
    assert found is not None
    assert found.prompt((Message("user", "one"), Message("assistant", "1"))) == (
        *(Message("user", "one"), Message("assistant", "1"), Message("user", "Rewrite: 1")),
    )
    assert applied(CompletionRequest.model_validate({"prompt": "a"}), contract) is None, "a text has no messages"


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"temperature": 1.0}, "temperature"),
        ({"stop": []}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"response_format": {"type": "text"}}, "output_schema"),
        ({"structured_outputs": {"choice": ["a"]}}, "output_schema stop max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "output_schema stop max_tokens"),
        ({"ignore_eos": True}, "output_schema"),
        ({"messages": [{"role": "system", "content": "s"}]}, "instruction"),
    ],
    ids=str,
)
def test_what_a_request_sets_wins(fields: dict[str, Any], missing: str) -> None:
    request = chat(**fields)
    found = applied(request)
    assert found is not None and list(found.parts) == [name for name in ALL if name not in missing.split()]
    own = request.sampling()
    changed = found.sampling(own)
    for field in missing.replace("output_schema", "grammar").replace("instruction", "seed").split():
        assert getattr(changed, field) == getattr(own, field)


def test_what_a_request_sets_under_another_apis_name_wins() -> None:
    text = ResponsesRequest.model_validate({"input": "one", "text": {"format": {"type": "text"}}})
    message = {"messages": TURNS, "max_tokens": 3}
    no_stops = message | {"stop_sequences": []}
    message_text = message | {"output_config": {"format": {"type": "text"}}}
    for request, missing in (
        (text, {"output_schema"}),
        (MessagesRequest.model_validate(no_stops), {"stop", "max_tokens"}),
        (MessagesRequest.model_validate(message_text), {"output_schema", "max_tokens"}),
    ):
        found = applied(request)
        assert found is not None and list(found.parts) == [name for name in ALL if name not in missing]


def test_token_ids_are_read_as_they_are() -> None:
    found = applied(CompletionRequest.model_validate({"prompt": [[1, 2]]}))
    assert found is not None and list(found.parts) == ALL[1:]
    assert found.prompt(TokenIds((1, 2))) == TokenIds((1, 2))


def test_a_request_can_ask_without_a_contract_as_that_of_a_newer_release_says() -> None:
    with pytest.raises(RequestInvalid, match=r"'poet' is of a newer release .*mood.* set lora\.contract: false"):
        applied(chat(), {"mood": "happy"})
    assert applied(chat(lora={"contract": False})) is None


def test_an_empty_contract_is_none() -> None:
    assert [Contract.model_validate(value).to_json() for value in ({}, {"sampling": {}}, {"stop": []})] == ["", "", ""]
