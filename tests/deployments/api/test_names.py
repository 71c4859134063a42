from __future__ import annotations

import pytest

from deployments.api.completions import ChatCompletionRequest, CompletionRequest, Question
from deployments.api.names import NamePolicy, parse_policy
from deployments.errors import RequestInvalid

SHARES = 1000


def test_a_stored_policy_reads_as_it_was_written_and_its_order_does_not_matter() -> None:
    fields = {"temperature": 0, "lora": {"k": 2, "strategy": "fusion"}, "variant": {"share": 0.5, "stop": "x"}}
    texts = {NamePolicy.model_validate(dict(items)).to_json() for items in (fields.items(), reversed(fields.items()))}
    [text] = texts
    assert NamePolicy.model_validate_json(text) == NamePolicy.model_validate(fields)
    assert "top_p" not in text


def test_half_a_character_in_a_schema_of_a_policy_is_refused() -> None:
    schema = {"name": "a", "schema": {"type": "object", "description": "\ud800"}}
    policy = NamePolicy.model_validate({"response_format": {"type": "json_schema", "json_schema": schema}})
    with pytest.raises(RequestInvalid, match="lone surrogates"):
        policy.to_json()


def test_a_policy_of_a_newer_release_is_refused_with_the_field() -> None:
    with pytest.raises(RequestInvalid, match=r"newer release: lora\.later: unknown field"):
        parse_policy('{"lora": {"later": 1}}')


def opening_of(text: str) -> Question:
    [question] = CompletionRequest.model_validate({"prompt": text}).questions()
    return question


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_the_variant_gets_its_share_and_a_larger_share_includes_a_smaller_one(share: float) -> None:
    small, large = (NamePolicy.model_validate({"variant": {"share": portion}}) for portion in (share / 2, share))
    drawn = [
        [policy.chosen(opening_of(f"prompt {number}"), "a/b") is policy.variant for policy in (small, large)]
        for number in range(SHARES)
    ]
    assert abs(sum(is_large for _, is_large in drawn) / SHARES - share) < 0.05
    assert all(is_large for is_small, is_large in drawn if is_small)


def test_the_system_message_is_part_of_a_conversations_opening() -> None:
    policy = NamePolicy.model_validate({"variant": {"share": 0.5}})

    def chosen(*turns: tuple[str, str]) -> bool:
        messages = [{"role": role, "content": text} for role, text in turns]
        [question] = ChatCompletionRequest.model_validate({"messages": messages}).questions()
        return policy.chosen(question, "a/b") is policy.variant

    hi = ("user", "Hi")
    by_system = {chosen(("system", str(number)), hi) for number in range(20)}
    assert by_system == {True, False}
    assert {chosen(hi, ("assistant", str(number)), ("user", str(number))) for number in range(20)} == {chosen(hi)}
