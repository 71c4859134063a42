"""Answers that call functions: prompts, grammars and calls of real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.preprocess import RequestPreprocessor, visible_tokens
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from gpu_worker.front.request.tool_prompts import find_style
from gpu_worker.front.request.tools import Function, Tools
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from gpu_worker.native.loop import Engine
from tests.gpu_worker.chat_templates import HERMES_TEMPLATE, LLAMA3_TEMPLATE, MISTRAL_TEMPLATE, TEMPLATES
from tests.gpu_worker.engine_driver import Answer, run_together

MakeEngine = Callable[..., Engine]
TinyBase = Callable[..., BaseModel]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
}
WEATHER, NOW = Function("get_weather", "Return it", json.dumps(CITY)), Function("now")
REQUIRED = Tools((WEATHER, NOW), required=True, is_parallel=False)  # a random model may go on forever
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def asked(tools: Tools | None, seed: int = 0, **changes: Any) -> Job:
    params = SamplingParams(**{"max_tokens": 200, "temperature": 1.0, "seed": seed, **changes})
    return Job(f"job-{seed}", (Message("user", "hi"),), sampling=params, tools=tools)


def completion_of(answer: Answer) -> Completion:
    assert answer.error is None, answer.error
    return Completion.joined([event for event in answer.events if isinstance(event, Delta)])


def assert_valid(completion: Completion) -> None:
    assert completion.finish_reason == "tool_calls" and completion.text == "" and completion.tool_calls
    for call in completion.tool_calls:
        schema = CITY if call.name == "get_weather" else json.loads(NOW.parameters)
        Draft202012Validator(schema).validate(json.loads(call.arguments))


def with_template(base: BaseModel, template: str | None) -> BaseModel:
    """Return the model with this template and room for descriptions of tools, in which each byte is a token."""
    base.tokenizer.chat_template = template
    return replace(base, max_position=4096)


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["alpaca", *TEMPLATES])
def test_an_answer_that_must_call_has_valid_calls(
    template: str | None, make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    engine = make_engine({}, base=with_template(tiny_base(), template), max_model_len=1600)
    jobs = [asked(REQUIRED, seed, logprobs=1, max_tokens=600) for seed in range(4)]
    named = asked(replace(REQUIRED, only="now"), 4)
    *answers, only = [completion_of(answer) for answer in run_together(engine, [*jobs, named])]
    for answer in answers:
        assert_valid(answer)
        assert len(answer.logprobs) == answer.num_new_tokens
    assert_valid(only)
    assert [call.name for call in only.tool_calls] == ["now"]


def row_of(engine: Engine, job: Job) -> Row:
    return engine.prepare(job, lambda event: None)


def said(engine: Engine, row: Row, text: str) -> Completion:
    """Return what the row answers if its tokens are those of this text."""
    ids = engine.base.tokenizer(text, add_special_tokens=False).input_ids
    deltas = []
    for token in [*ids, min(row.end_ids)]:
        delta = row.append_token(token)
        deltas += [] if delta is None else [delta]
        if delta is not None and delta.finish_reason is not None:
            break
    return Completion.joined(deltas)


def test_calls_that_the_model_chooses_are_read_from_its_text(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    engine = make_engine({}, base=with_template(tiny_base(), HERMES_TEMPLATE), max_model_len=1600)
    job = asked(Tools((WEATHER, NOW)))
    found = said(engine, row_of(engine, job), f"Wait.\n{CALL}\n{CALL}")
    assert (found.text, [call.name for call in found.tool_calls], found.finish_reason) == (
        "Wait.",
        ["now", "now"],
        "tool_calls",
    )
    plain = said(engine, row_of(engine, replace(job, tools=None)), CALL)
    assert (plain.text, plain.tool_calls, plain.finish_reason) == (CALL, (), "stop")


def test_one_call_ends_an_answer_where_calls_are_not_parallel(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    engine = make_engine({}, base=with_template(tiny_base(), HERMES_TEMPLATE), max_model_len=1600)
    row = row_of(engine, asked(Tools((NOW,), is_parallel=False)))
    found = said(engine, row, CALL + CALL)
    assert len(found.tool_calls) == 1 and found.finish_reason == "tool_calls"
    assert row.num_new_tokens == len(CALL.removesuffix("\n</tool_call>")), "one token is a byte"


def test_tools_are_part_of_the_prompt_and_of_its_key_in_the_cache(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    engine = make_engine({}, base=with_template(tiny_base(), HERMES_TEMPLATE), max_model_len=1600)
    for tools in (None, Tools((NOW,)), Tools((WEATHER,)), None):
        row = row_of(engine, asked(tools))
        prompt = engine.base.tokenizer.decode(row.tokens)
        assert ("now" in prompt) == (tools == Tools((NOW,))) and ("get_weather" in prompt) == (
            tools == Tools((WEATHER,))
        )


@pytest.mark.parametrize(
    ("template", "marker"), [(MISTRAL_TEMPLATE, "[TOOL_CALLS]"), (LLAMA3_TEMPLATE, "<|python_tag|>")]
)
def test_a_marker_that_is_a_special_token_has_a_text(
    template: str, marker: str, make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    base = with_template(tiny_base("llama_512_ids"), template)
    base.tokenizer.add_special_tokens({"additional_special_tokens": [marker, "<other>"]})
    place = base.tokenizer.convert_tokens_to_ids(marker)
    assert visible_tokens(base, find_style(base.tokenizer)) == {place: marker}
    engine = make_engine({}, "llama_512_ids", base=base, max_model_len=1600)
    call = '[{"name": "now", "arguments": {}}]' if marker == "[TOOL_CALLS]" else '{"name": "now", "parameters": {}}'
    found = said(engine, row_of(engine, asked(Tools((NOW,)))), f"Hm <other>{marker}{call}")
    assert (found.text, [c.name for c in found.tool_calls]) == ("Hm", ["now"])
    [answer] = run_together(engine, [asked(REQUIRED, 1, max_tokens=600)])
    assert_valid(completion_of(answer))
    assert (place in answer.tokens) == (marker == "[TOOL_CALLS]"), "the grammar uses the model's own token"


def test_a_setting_names_the_form(tiny_base: TinyBase) -> None:
    prepare = RequestPreprocessor(with_template(tiny_base(), HERMES_TEMPLATE), 1600, tool_parser="mistral")
    job = asked(Tools((replace(NOW, strict=True),)))
    grammar = prepare.grammar_of(job)
    assert grammar is not None and "[TOOL_CALLS]" in grammar.text
    with pytest.raises(SamplingInvalid, match="tools: this engine has no structured output"):
        prepare(job, lambda event: None)


def test_options_that_contradict_the_grammar_are_refused(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    engine = make_engine({}, base=with_template(tiny_base(), None), max_model_len=1600)
    with pytest.raises(SamplingInvalid, match="ignore_eos"):
        row_of(engine, asked(REQUIRED, ignore_eos=True))
    with pytest.raises(SamplingInvalid, match="cannot be combined with tools"):
        row_of(engine, asked(Tools((NOW,)), grammar=Grammar("regex", "a", "structured_outputs.regex")))
