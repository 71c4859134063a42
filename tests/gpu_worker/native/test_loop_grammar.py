"""Answers that follow a grammar: validity, ends, batches, preemption, adapters."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator

from gpu_worker.errors import GrammarFailed, LogitsNotFinite
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.output_head import OutputHead
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.native.loop import Engine
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    Answer,
    ask,
    assert_nothing_held,
    greedy,
    run_together,
)
from tests.gpu_worker.front.grammar.schemas import random_schema
from tests.soak import Scale
from tests.tiny import tiny_config

MakeEngine = Callable[..., Engine]
COLOURS = Grammar("regex", "(red|green|blue)")


def sampled(grammar: Grammar, seed: int = 0, plan: Plan = BASE_PLAN, num_new: int = 100, **changes: object) -> Job:
    params = {"max_tokens": num_new, "temperature": 1.0, "seed": seed, "grammar": grammar, **changes}
    return Job(f"job-{seed}", "make one", plan, SamplingParams(**params))  # type: ignore[arg-type]


def finish_of(answer: Answer) -> str | None:
    assert isinstance(answer.events[-1], Delta), answer.error
    return answer.events[-1].finish_reason


def test_random_schemas_give_valid_json_at_temperature_1(make_engine: MakeEngine, scale: Scale) -> None:
    engine = make_engine({}, max_model_len=512, family="llama_512_ids")
    num_schemas = scale.pick("schemas", small=8, full=200)
    schemas = [random_schema(seed) for seed in range(num_schemas)]
    jobs = [
        sampled(Grammar("json_schema", json.dumps(schema)), seed, num_new=400) for seed, schema in enumerate(schemas)
    ]
    for schema, answer in zip(schemas, run_together(engine, jobs), strict=True):
        assert finish_of(answer) == "stop", answer.text
        Draft202012Validator(schema).validate(json.loads(answer.text))
    assert_nothing_held(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_an_engine_that_computes_the_whole_head(
    dtype: str, make_engine: MakeEngine, tiny_folders: Mapping[str, Path]
) -> None:
    """Greedy and sampled rows, some with log probabilities, in one batch with free rows and guesses of these."""
    grammars = [Grammar("json_schema", json.dumps(random_schema(3))), Grammar("regex", "(one|two) [0-9]{3}-[a-z]{2,5}")]
    scored = {"logprobs": 2, "max_tokens": 6}
    changes: list[dict[str, object]] = [{"temperature": 0.0}, {}, scored, {"presence_penalty": 1.5}]
    jobs = [greedy("the cat and the dog and the cat", request_id=f"free {n}", num_new=6) for n in range(2)]
    for seed, own in enumerate(changes):
        jobs += [sampled(grammar, seed, num_new=20, **own) for grammar in grammars]
    base = load_base_model(tiny_config(tiny_folders["gemma3"], dtype=dtype))
    engine = make_engine({}, base=base, prompt_lookup_tokens=4, max_batch_size=len(jobs), prefix_cache=False)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"logprobs": 2},
        {"stop": ("ange, or",)},
        {"max_tokens": 9},
        {"presence_penalty": 1.0},
    ],
    ids=str,
)
def test_tokens_without_a_choice_are_computed_in_one_step(
    changes: dict[str, object], dtype: str, make_engine: MakeEngine, tiny_folders: Mapping[str, Path]
) -> None:
    """The answers are those of one token a step, bit for bit in a batch with other rows."""
    base = load_base_model(tiny_config(tiny_folders["gemma3"], dtype=dtype))
    engine = make_engine({}, base=base, prefix_cache=False)
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


def test_a_grammar_that_fails_ends_its_own_row_only(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    bad, good = ask(engine, sampled(COLOURS, 1)), ask(engine, sampled(COLOURS, 2))
    assert bad.row.grammar is not None
    bad.row.grammar.error = "it is too complex"
    engine.run_until_idle()
    assert isinstance(bad.error, GrammarFailed) and "it is too complex" in str(bad.error)
    assert good.text in {"red", "green", "blue"}
    assert_nothing_held(engine)


def test_a_step_without_grammars_starts_no_thread(make_engine: MakeEngine) -> None:
    before = {thread.name for thread in threading.enumerate()}
    run_together(make_engine({}), [greedy("no grammar")])
    started = {thread.name for thread in threading.enumerate()} - before
    assert not [name for name in started if name.startswith("grammar")]
