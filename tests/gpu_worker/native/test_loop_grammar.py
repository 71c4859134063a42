"""Answers that follow a grammar: validity, ends, batches, preemption, adapters.

Answers that call functions: prompts, grammars and calls of real engines.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from gpu_worker.errors import LogitsNotFinite, SamplingInvalid
from gpu_worker.front.grammar import library
from gpu_worker.front.preprocess import RequestPreprocessor, visible_tokens
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from gpu_worker.front.request.tool_prompts import find_style
from gpu_worker.front.request.tools import Function, Tools
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.output_head import OutputHead
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.native.loop import Engine
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.chat_templates import HERMES_TEMPLATE, LLAMA3_TEMPLATE, MISTRAL_TEMPLATE
from tests.gpu_worker.engine_driver import Answer, MakeEngine, ask, assert_nothing_held, greedy, run_together
from tests.gpu_worker.front.grammar.schemas import random_schema
from tests.tiny import TinyBase


def sampled(grammar: Grammar, seed: int = 0, plan: Plan = BASE_PLAN, num_new: int = 100, **changes: object) -> Job:
    params = {"max_tokens": num_new, "temperature": 1.0, "seed": seed, "grammar": grammar, **changes}
    return Job(f"job-{seed}", "make one", plan, SamplingParams(**params))  # type: ignore[arg-type]


def finish_of(answer: Answer) -> str | None:
    assert isinstance(answer.events[-1], Delta), answer.error
    return answer.events[-1].finish_reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_an_engine_that_computes_the_whole_head(dtype: str, make_engine: MakeEngine) -> None:
    """Greedy and sampled rows, some with log probabilities, in one batch with free rows and guesses of these."""
    grammars = [Grammar("json_schema", json.dumps(random_schema(3))), Grammar("regex", "(one|two) [0-9]{3}-[a-z]{2,5}")]
    scored = {"logprobs": 2, "max_tokens": 6}
    changes: list[dict[str, object]] = [{"temperature": 0.0}, {}, scored, {"presence_penalty": 1.5}]
    jobs = [greedy("the cat and the dog and the cat", request_id=f"free {n}", num_new=6) for n in range(2)]
    for seed, own in enumerate(changes):
        jobs += [sampled(grammar, seed, num_new=20, **own) for grammar in grammars]
    engine = make_engine({}, dtype=dtype, prompt_lookup_tokens=4, max_batch_size=len(jobs), prefix_cache=False)
    base = engine.base
    head, whole_products = base.model.get_output_embeddings(), list[int]()
    assert isinstance(head, OutputHead)
    head.whole.register_forward_hook(lambda *_: whole_products.append(1))
    found = run_together(engine, jobs)
    assert len(whole_products) < engine.num_steps or not isinstance(head.whole, KernelLinear)
    base.model.set_output_embeddings(head.whole)
    for one, other in zip(found, run_together(engine, jobs), strict=True):
        assert (one.tokens, one.text) == (other.tokens, other.text), one.row.request_id
        logprobs = [[event.logprobs for event in answer.events if isinstance(event, Delta)] for answer in (one, other)]
        assert logprobs[0] == logprobs[1]


def answers_of(engine: Engine, jobs: list[Job], *, has_runs: bool) -> tuple[list[Answer], int]:
    """Return the answers and the number of steps."""
    answers, began = [ask(engine, job) for job in jobs], engine.num_steps
    for answer in answers:
        if answer.row.grammar is not None and not has_runs:
            answer.row.grammar.longest_run = 0
    engine.run_until_idle()
    assert_nothing_held(engine)
    return answers, engine.num_steps - began


def logprobs_of(answer: Answer) -> list[float]:
    return [entry.logprob for event in answer.events if isinstance(event, Delta) for entry in event.logprobs]


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"temperature": 0.0}, "bfloat16"),
        ({"logprobs": 2}, "float32"),
        ({"logprobs": 2}, "bfloat16"),
        ({"stop": ("ange, or",)}, "float32"),
        ({"max_tokens": 9}, "bfloat16"),
        ({"presence_penalty": 1.0}, "float32"),
    ],
    ids=str,
)
def test_tokens_without_a_choice_are_computed_in_one_step(
    changes: dict[str, object], dtype: str, make_engine: MakeEngine
) -> None:
    """The answers are those of one token a step, bit for bit in a batch with other rows."""
    engine = make_engine({}, dtype=dtype, prefix_cache=False)
    grammar = Grammar("regex", "[ab]orange, or [0-9] apples[xyz]")
    jobs = [sampled(grammar, seed, **changes) for seed in range(3)]
    jobs += [greedy("free", num_new=4)]
    (found, num_steps), (expected, most) = (answers_of(engine, jobs, has_runs=runs) for runs in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text, finish_of(one)) == (other.tokens, other.text, finish_of(other))
        assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=1e-2 if dtype == "bfloat16" else 1e-4)
    has_runs = not {"logprobs", "presence_penalty"} & changes.keys()  # these need the logits of every token
    assert num_steps <= most - 4 if has_runs else num_steps == most


@pytest.mark.parametrize("limit", ["stop", "max_tokens"])
def test_a_grammar_with_limits_of_its_own_has_runs(limit: str, make_engine: MakeEngine) -> None:
    """llguidance cannot roll back the matchers of such grammars."""
    end = 'stop="q"' if limit == "stop" else "max_tokens=2"
    grammar = Grammar("grammar", f'start: "abcdef" t "xyz"\nt[{end}]: /[a-z]*/')
    [answer], num_steps = answers_of(make_engine({}), [sampled(grammar)], has_runs=True)
    assert finish_of(answer) == "stop" and re.fullmatch("abcdef[a-z]*xyz", answer.text)
    assert num_steps < len(answer.tokens) - 4


def test_runs_take_no_more_tokens_than_a_step_may_have(make_engine: MakeEngine) -> None:
    jobs = [sampled(Grammar("regex", "[ab]orange, or"), seed) for seed in range(3)]
    answers, _ = answers_of(make_engine({}, max_step_tokens=6, max_batch_size=3), jobs, has_runs=True)
    assert all(re.fullmatch("[ab]orange, or", answer.text) for answer in answers)


def test_a_row_that_is_not_finite_in_a_run_fails_and_keeps_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    spoiled = [False]

    def spoil(module: torch.nn.Module, inputs: object, hidden: torch.Tensor) -> torch.Tensor | None:
        spoiled[0] |= hidden.shape[1] > 3 and bool(answer.row.guess)
        return torch.full_like(hidden, torch.nan) if spoiled[0] else None

    answer = ask(engine, sampled(Grammar("regex", "[ab]orange, or"), stop=("ange",)))
    engine.base.model.get_input_embeddings().register_forward_hook(spoil)
    engine.run_until_idle()
    assert isinstance(answer.error, LogitsNotFinite) and spoiled[0]
    assert "".join(event.text for event in answer.events if isinstance(event, Delta)) in {"", "a", "b", "ao", "bo"}
    assert_nothing_held(engine)


def test_a_template_stops_no_answer_that_has_a_grammar(make_engine: MakeEngine) -> None:
    text = "### Instruction: x"
    job = sampled(Grammar("choice", json.dumps([text])))
    messages = replace(job, prompt=(Message("user", "hello"),), template="alpaca")
    [answer] = run_together(make_engine({}, max_model_len=320), [messages])
    assert answer.text == text


def test_a_preempted_answer_goes_on_in_its_grammar(make_engine: MakeEngine) -> None:
    grammar = Grammar("regex", "[ab]{70}")
    jobs = [sampled(grammar, seed, num_new=75) for seed in range(4)]
    tight, ample = make_engine({}, kv_tokens=160), make_engine({})
    found, expected = run_together(tight, jobs), run_together(ample, jobs)
    assert tight.counters.num_preemptions > 0 == ample.counters.num_preemptions
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert all(re.fullmatch("[ab]{70}", answer.text) for answer in found)
    assert_nothing_held(tight)


def test_rows_go_on_where_others_have_used_up_the_states_of_their_lexer(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar("regex", "([a-dxy]{1,40}x[a-dxy]{1,40}y){3}")
    jobs = [sampled(grammar, seed) for seed in range(8)]
    expected = run_together(make_engine({}, max_batch_size=8), jobs)
    monkeypatch.setattr(library, "_MAX_LEXER_STATES", 800)
    engine = make_engine({}, max_batch_size=4)
    for _ in range(2):  # the grammar is not refused afterwards
        found = run_together(engine, jobs)
        assert [finish_of(answer) for answer in found] == [finish_of(answer) for answer in expected]
        assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert_nothing_held(engine)


def test_a_step_without_grammars_starts_no_thread(make_engine: MakeEngine) -> None:
    before = {thread.name for thread in threading.enumerate()}
    run_together(make_engine({}), [greedy("no grammar")])
    started = {thread.name for thread in threading.enumerate()} - before
    assert not [name for name in started if name.startswith("grammar")]


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


@pytest.mark.parametrize("template", [None, HERMES_TEMPLATE], ids=["alpaca", "hermes"])
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
