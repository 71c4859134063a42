"""Answers that follow a grammar: valid, in one batch with others, under every plan; and grammars that are refused."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from gpu_worker.errors import GrammarFailed, GrammarInvalid
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Job, SamplingParams
from gpu_worker.front.request.tools import Function, Tools
from gpu_worker.front.text.token_bytes import TokenBytes
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.conformance.driver import (
    EOS_ID,
    GREEDY,
    MARKER,
    TURN_END_ID,
    HostedEngine,
    MakeAdapter,
    assert_same,
    job,
)
from tests.tiny import byte_tokenizer, plan_of

_BYTES = TokenBytes(byte_tokenizer().backend_tokenizer)
COLOURS = Grammar("regex", "(red|green|blue)")
_NUMBER = {"type": "object", "properties": {"n": {"enum": [1, 20]}}, "required": ["n"], "additionalProperties": False}
CALL = Grammar("tool_calls", json.dumps({"rules": 'start: "<call>" schema_0 "</call>"\n', "schemas": {"/0": _NUMBER}}))
_TAGS = {"type": "array", "items": {"enum": [1, "x"]}, "maxItems": 2}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "tags": _TAGS},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def bound(grammar: Grammar, plan: Plan = BASE_PLAN, *, num_new: int = 90, **changes: object) -> Job:
    """Return a job that samples an answer of the grammar."""
    params = {"max_tokens": num_new, "temperature": 1.0, "seed": 3, "grammar": grammar, **changes}
    return job("make one", plan, SamplingParams(**params))  # type: ignore[arg-type]


def of_schema(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), "response_format")


def test_a_schema_gives_valid_json_and_ends_the_answer(hosted: HostedEngine) -> None:
    for answer in hosted.answers(*[bound(of_schema(PERSON), seed=seed) for seed in range(4)]):
        assert answer.finish_reason == "stop", answer.text
        Draft202012Validator(PERSON).validate(json.loads(answer.text))


def test_json_has_no_unbounded_white_space(hosted: HostedEngine) -> None:
    """A model that prefers spaces would otherwise never end its answer."""
    spaces = tuple((token, 50.0) for token in range(256) if _BYTES(token) in (b" ", b"\n"))
    [answer] = hosted.answers(bound(of_schema(PERSON), num_new=200, logit_bias=spaces))
    outside_texts = re.sub(r'"[^"]*"', '""', answer.text)
    assert re.fullmatch(r'\{ "" : "" , "" : \[ ("" (, "" )*)?\] \}', outside_texts), answer.text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (COLOURS, "red|green|blue"),
        (Grammar("regex", "[a-c]{4,9}-[0-9]{3}"), "[a-c]{4,9}-[0-9]{3}"),
        (Grammar.of_choices(["red", "grün", "two words"], "structured_outputs.choice"), "red|grün|two words"),
        (Grammar("grammar", 'start: pair ("," pair)?\npair: /[xy]/ "=" /[0-9]{1,2}/'), r"[xy]=\d\d?(,[xy]=\d\d?)?"),
        (Grammar("grammar", 'root ::= ("on" | "off") "!"'), "(on|off)!"),
        (CALL, r'<call>\{\s*"n"\s*:\s*(1|20)\s*\}</call>'),
    ],
    ids=["alternatives", "ranges", "choices", "lark", "gbnf", "tool call"],
)
def test_every_kind_of_grammar_is_followed(grammar: Grammar, pattern: str, hosted: HostedEngine) -> None:
    changes = {"frequency_penalty": 1.5, "top_p": 0.9, "logprobs": 2}
    answers = hosted.answers(bound(grammar), bound(grammar, seed=4), bound(grammar, **changes))
    for answer in answers:
        assert re.fullmatch(pattern, answer.text) and answer.finish_reason == "stop", answer.text
    tokens = [entry.token for entry in answers[-1].logprobs if not entry.is_end]
    assert b"".join(tokens).decode() == answers[-1].text


def test_rows_with_and_without_a_grammar_share_a_batch(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    pool = [adapter(seed) for seed in range(3)]
    plans = [
        BASE_PLAN,
        plan_of("selection", (pool[0], 1.0)),
        plan_of("mixture", (pool[0], 0.5), (pool[1], 0.3), (pool[2], -0.2)),
        plan_of("fusion", (pool[1], 0.5), (pool[2], 0.5)),
    ]
    free = [job("a free row", plan) for plan in plans]
    alone = [answer for one in free for answer in hosted.answers(one)]
    together = hosted.answers(*free, *[bound(COLOURS, plan, temperature=0) for plan in plans])
    assert_same(together[:4], alone, tolerance)
    assert {answer.text for answer in together[4:]} <= {"red", "green", "blue"}


def test_every_id_that_ends_answers_ends_one_of_a_grammar(hosted: HostedEngine) -> None:
    for token, other in ((EOS_ID, TURN_END_ID), (TURN_END_ID, EOS_ID)):
        biased = ((token, 100.0), (other, -100.0))
        [answer] = hosted.answers(bound(Grammar("regex", "[ab]+"), logit_bias=biased))
        assert answer.finish_reason == "stop" and answer.text in {"a", "b"}


def test_a_call_begins_with_the_special_token_that_marks_it(hosted: HostedEngine) -> None:
    sampling = SamplingParams(max_tokens=45, temperature=0, logprobs=0)
    tools = Tools((Function("now"),), required=True)
    [answer] = hosted.answers(replace(job((Message("user", "hi"),), sampling=sampling), tools=tools))
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [("now", {})]
    assert answer.logprobs[0].token == MARKER.encode()


def test_log_probabilities_are_those_before_the_grammars_mask(hosted: HostedEngine, tolerance: float) -> None:
    free = job("make one", sampling=replace(GREEDY, max_tokens=1))
    answers = hosted.answers(bound(COLOURS, num_new=1, logprobs=20), free)
    found, expected = ([value for _, value in answer.logprobs[0].top] for answer in answers)
    assert found == pytest.approx(expected, abs=tolerance)


def test_max_tokens_cuts_an_answer(hosted: HostedEngine) -> None:
    [answer] = hosted.answers(
        bound(of_schema({"type": "array", "minItems": 50, "items": {"type": "integer"}}), num_new=3)
    )
    assert (answer.finish_reason, answer.num_new_tokens) == ("length", 3)


def test_a_stop_string_ends_an_answer_before_its_grammar_does(hosted: HostedEngine) -> None:
    [answer] = hosted.answers(bound(Grammar("regex", "(yes|no), and more"), stop=(" and",)))
    assert answer.text in {"yes,", "no,"} and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("grammar", "pointer"),
    [
        (of_schema({"type": "object", "properties": {"a": {"type": "strin"}}}), "/properties/a"),
        (of_schema({"type": "string", "minLength": 9, "maxLength": 2}), ""),
        (Grammar("json_schema", "{"), ""),
        (Grammar("regex", "a(b"), ""),
        (Grammar("grammar", "start: missing"), ""),
        (Grammar("regex", "((((a{100}){100}){100}){100}){100}"), ""),
    ],
    ids=["unknown type", "empty range", "no JSON", "open group", "no rule", "too large"],
)
def test_a_grammar_that_cannot_be_compiled_fails_only_its_own_job(
    grammar: Grammar, pointer: str, hosted: HostedEngine
) -> None:
    refused, neighbour = hosted.outcomes(bound(grammar), job("neighbour"))
    assert isinstance(neighbour, Completion)
    assert isinstance(refused, GrammarInvalid), refused
    assert (refused.pointer, refused.param) == (pointer, grammar.param)


_WIDE = "|".join(f".{{1,{number}}}{chr(97 + number % 26)}{number}" for number in range(2, 4000))
_PARTS = [f"part{number}" for number in range(60)]
_DEEP = "".join(f'{part}: {part} {part} | "a"\n' for part in _PARTS)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", f"x{{50}}({_WIDE})"),
        Grammar("grammar", f'start: /x{{50}}/ ({"|".join(_PARTS)}) "c"\n{_DEEP}'),
    ],
    ids=["when a mask is computed", "when a token is read"],
)
def test_a_grammar_that_becomes_too_complex_fails_the_answer(grammar: Grammar, hosted: HostedEngine) -> None:
    """Its check, which follows fewer bytes, passes."""
    likely_a = tuple((token, 50.0) for token in range(256) if _BYTES(token) == b"a")
    failed, neighbour = hosted.outcomes(bound(grammar, logit_bias=likely_a), job("neighbour"))
    assert isinstance(failed, GrammarFailed), failed
    assert isinstance(neighbour, Completion)
    assert isinstance(hosted.error(bound(grammar)), GrammarInvalid), "it is refused for some time"


def nested(depth: int) -> object:
    """Return a schema of objects inside objects, each of which has two levels of JSON."""
    return {"type": "object", "properties": {"a": nested(depth - 1)}, "required": ["a"]} if depth else {"const": 1}


@pytest.mark.parametrize(
    "grammar", [of_schema(nested(40)), Grammar("regex", "a\0?b", "structured_outputs.regex")], ids=["depth", "zero"]
)
def test_a_grammar_that_only_vllm_refuses_is_named(grammar: Grammar, hosted: HostedEngine) -> None:
    [outcome] = hosted.outcomes(bound(grammar))
    if hosted.config.engine == "native":
        assert isinstance(outcome, Completion)
    else:
        assert isinstance(outcome, GrammarInvalid) and outcome.param == grammar.param, outcome


def test_a_stream_follows_its_grammar_and_refuses_a_bad_one(hosted: HostedEngine) -> None:
    async def streamed(asked: Job) -> str:
        return "".join([delta.text async for delta in hosted.engine.stream(asked) if delta is not None])

    assert hosted.run(streamed(bound(COLOURS))) in {"red", "green", "blue"}
    with pytest.raises(GrammarInvalid):
        hosted.run(streamed(bound(Grammar("regex", "a(b"))))


def test_cancelled_answers_of_a_grammar_free_their_places(hosted: HostedEngine) -> None:
    async def cancel() -> None:
        jobs = [bound(Grammar("regex", "[ab]{80}"), num_new=90)] * 10
        task = asyncio.create_task(hosted.engine.generate(jobs))
        while not (await hosted.engine.status()).num_running:
            await asyncio.sleep(0.01)
        task.cancel()
        while (status := await hosted.engine.status()).num_running + status.num_waiting:
            await asyncio.sleep(0.01)

    hosted.run(cancel())
    [answer] = hosted.answers(job("after", sampling=GREEDY))
    assert answer.num_new_tokens == GREEDY.max_tokens
